"""Speed, measured: our steps beside those of other libraries and of a plain CL-MAE. `make bench` runs it."""

"""The evaluation against slow references, under reordering and rescaling, and with data it must refuse."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import nn

from clmae import config, evaluate
from clmae.config import UserError
from clmae.mae import Prediction, build_mae


def blobs(n, *, d=12, classes=3, noise=0.3, seed=0):
    rng, y = np.random.default_rng(seed), np.arange(n) % classes
    return (np.eye(classes, d)[y] + noise * rng.standard_normal((n, d))).astype(np.float32), y


def slow_votes(similarity, labels, classes, k, temperature):
    """One test image at a time, one neighbour at a time."""
    votes = np.zeros((len(similarity), classes))
    for row, s in zip(votes, similarity):
        kth = sorted(s, reverse=True)[k - 1]
        for value, label in zip(s, labels):
            if value >= kth:
                row[label] += np.exp((value - s.max()) / temperature)
    return votes


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 25), levels=st.integers(1, 30), seed=st.integers(0, 999), data=st.data())
def test_votes_are_those_of_a_slow_loop_ties_included(n, levels, seed, data):
    rng, k = np.random.default_rng(seed), data.draw(st.integers(1, n))
    similarity = rng.integers(-levels, levels + 1, (4, n)) / levels  # few levels: many ties
    labels = rng.integers(0, 3, n)
    one_hot = torch.nn.functional.one_hot(torch.tensor(labels), 3).double()
    ours = evaluate.neighbour_votes(torch.tensor(similarity), one_hot, k, 0.07).numpy()
    np.testing.assert_allclose(ours, slow_votes(similarity, labels, 3, k, 0.07), rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 40), chunk=st.integers(1, 50))
def test_knn_does_not_depend_on_order_scale_or_chunks(seed, k, chunk):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((40, 6)), rng.integers(0, 3, 40)
    test = rng.standard_normal((30, 6))
    expected = evaluate.knn_predict(x, y, test, k=k)
    order = rng.permutation(40)
    np.testing.assert_array_equal(evaluate.knn_predict(x[order], y[order], test, k=k), expected)
    np.testing.assert_array_equal(evaluate.knn_predict(100 * x, y, 0.01 * test, k=k, chunk=chunk), expected)


def test_knn_survives_a_zero_feature_and_refuses_a_k_that_is_too_large():
    x, y = blobs(9)
    x[0] = 0
    assert np.isin(evaluate.knn_predict(x, y, np.zeros((2, 12), np.float32), k=9), [0, 1, 2]).all()
    with pytest.raises(UserError, match=r"evaluate\.k: 10 neighbours .* 9 training images; set k ≤ 9"):
        evaluate.knn_predict(x, y, x, k=10)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 3000), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_interval_is_the_binomial_one(m, share, seed):
    correct = np.arange(m) < round(share * m)
    ci = evaluate.accuracy_interval(correct, bootstrap=4000, seed=seed)
    assert 0 <= ci["low"] <= ci["accuracy"] <= ci["high"] <= 1
    low, high = binom.ppf([0.025, 0.975], m, correct.mean()) / m
    tolerance = 1.01 / m + 0.15 * np.sqrt(correct.mean() * (1 - correct.mean()) / m)
    assert abs(ci["low"] - low) <= tolerance and abs(ci["high"] - high) <= tolerance


def test_interval_is_seeded_and_narrows_with_more_images():
    few, many = np.arange(100) < 60, np.arange(10_000) < 6000
    assert evaluate.accuracy_interval(few) == evaluate.accuracy_interval(few)
    assert len({str(evaluate.accuracy_interval(few, seed=s, bootstrap=99)) for s in range(5)}) > 1
    width = [ci["high"] - ci["low"] for ci in map(evaluate.accuracy_interval, (few, many))]
    assert 7 < width[0] / width[1] < 13  # 1/√m: ten times


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_hold_out_takes_a_fifth_of_each_class_and_leaves_some(counts, seed):
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    held = np.bincount(y[evaluate.hold_out(y, seed=seed)], minlength=len(counts))
    for count, taken in zip(counts, held):
        assert taken == (max(1, round(count / 5)) if count > 1 else 0)
        assert taken < count


def test_linear_probe_solves_what_is_separable_and_says_when_it_did_not_converge(monkeypatch):
    (x, y), (test_x, test_y) = blobs(150, noise=0.05), blobs(90, noise=0.05, seed=1)
    result = evaluate.linear(x, y, test_x, test_y)
    assert result["accuracy"] == 1.0 and result["converged"]
    monkeypatch.setattr(
        evaluate, "LogisticRegression", lambda C, max_iter: LogisticRegression(C=C, max_iter=1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate.linear(x, y, test_x, test_y, probe_c=[1.0])["converged"] is False


def test_c_is_chosen_without_the_test_images_and_of_equals_the_smallest():
    x, y = blobs(150, noise=0.05)  # every C is perfect here
    assert evaluate.choose_c(x, y, [1.0, 0.1, 10.0]) == 0.1
    _, notes = evaluate.linear_predict(x, y, -x)
    assert notes == evaluate.linear_predict(x, y, x)[1]


def test_every_evaluation_is_deterministic_and_beats_chance_only_with_real_labels():
    (x, y), (test_x, test_y) = blobs(150), blobs(90, seed=1)
    nonsense = np.random.default_rng(0).permutation(y)
    for name, f in evaluate.evaluations.items():
        result = f(x, y, test_x, test_y)
        assert result == f(x, y, test_x, test_y), name
        assert result["low"] > 0.6 > f(x, nonsense, test_x, test_y)["low"], name


def test_defaults_are_those_of_the_configuration():
    section, probes = config.Evaluate(), evaluate.evaluations.values()
    others = (evaluate.knn_predict, evaluate.linear_predict, evaluate.knn_monitor, evaluate.consistency)
    for f in (*probes, *others):
        for name, parameter in inspect.signature(f).parameters.items():
            own = name in {"chunk", "norm_pix", "ratio"}  # a run's, not the section's
            if parameter.kind is parameter.KEYWORD_ONLY and not own:
                assert parameter.default == getattr(section, name), (f.__name__, name)
    assert inspect.signature(evaluate.embedding).parameters["images"].default == section.embedding_images


def test_a_new_evaluation_brings_its_own_settings(monkeypatch):
    def majority(train_x, train_y, test_x, test_y, *, bonus):
        return {"accuracy": float(np.mean(test_y == np.bincount(train_y).argmax())) + bonus}

    monkeypatch.setitem(evaluate.evaluations, "majority", majority)
    result = evaluate.evaluate_features(*blobs(60), *blobs(60, seed=1), bonus=0.5)
    assert result["majority"]["accuracy"] == pytest.approx(1 / 3 + 0.5)
    assert {"knn", "linear", "train_images", "test_images", "width"} < set(result)
    with pytest.raises(UserError, match="unknown evaluation setting 'bonsu'.*did you mean 'bonus'"):
        evaluate.evaluate_features(*blobs(60), *blobs(60), bonsu=1)


@pytest.mark.parametrize(
    "train_y, test_y, reason",
    [
        ([-1] * 6, [0, 1, 2], "train split have no labels"),
        ([0, 1, 2] * 2, [-1] * 3, "test split have no labels"),
        ([0] * 6, [0] * 3, "one class"),
        ([0, 1, 2] * 2, [], "no images"),
    ],
)
def test_what_cannot_be_evaluated_is_skipped_with_a_reason(train_y, test_y, reason):
    x, test_x = np.ones((6, 4), np.float32), np.ones((len(test_y), 4), np.float32)
    assert reason in evaluate.evaluate_features(x, np.array(train_y), test_x, np.array(test_y))["skipped"]


@pytest.mark.parametrize(
    "change, line",
    [
        (dict(test_y=[0, 1, 3]), "class 'owl' has 1 test images but no training image"),
        (dict(train_y=[0, 1, 2, 0, 1, -1]), "train: 1 of 6 images have no label; label all of them or none"),
        (dict(train_x=np.full((6, 4), np.nan)), "train: 6 of 6 images have features that are not finite"),
        (dict(test_x=np.ones((3, 5))), "features are 4 wide in train but 5 in test"),
        (dict(train_x=np.ones((5, 4))), r"train: features \(5, 4\) and 6 labels"),
    ],
)
def test_what_would_give_a_wrong_number_is_refused(change, line):
    good = dict(train_x=np.ones((6, 4)), train_y=[0, 1, 2] * 2, test_x=np.ones((3, 4)), test_y=[0, 1, 2])
    args = [np.asarray(v) for v in (good | change).values()]
    with pytest.raises(UserError, match=line):
        evaluate.evaluate_features(*args, classes=["cat", "dog", "eel", "owl"], k=2)


class Noisy(nn.Module):
    """An encoder with dropout and a frozen part; can be told to fail."""

    def __init__(self, fail=False):
        super().__init__()
        self.body, self.drop, self.frozen, self.fail = nn.Linear(12, 5), nn.Dropout(0.5), nn.Identity(), fail
        self.train()
        self.frozen.eval()

    def forward(self, images):
        if self.fail:
            raise RuntimeError("out of memory")
        return self.frozen(self.drop(self.body(images.flatten(1))))


def test_features_leave_no_trace():
    torch.manual_seed(0)
    images, encoder = torch.randn(11, 3, 2, 2), Noisy()
    state = torch.get_rng_state()
    x = evaluate.features(encoder, images.split(4))
    assert x.shape == (11, 5) and x.dtype == np.float32
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.drop.training and not encoder.frozen.training
    encoder(images).sum().backward()  # gradients still work afterwards
    assert encoder.body.weight.grad is not None


def test_features_restore_the_mode_even_when_the_encoder_fails():
    encoder = Noisy(fail=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate.features(encoder, [torch.randn(2, 3, 2, 2)])
    assert encoder.drop.training and not encoder.frozen.training


@settings(max_examples=20, deadline=None)
@given(cells=st.tuples(st.integers(1, 4), st.integers(1, 4)), c=st.integers(1, 3), seed=st.integers(0, 99))
def test_pixels_are_area_means(cells, c, seed):
    images = torch.tensor(np.random.default_rng(seed).random((3, c, 4 * cells[0], 4 * cells[1])))
    means = images.reshape(3, c, 4, cells[0], 4, cells[1]).mean((3, 5)).flatten(1)
    np.testing.assert_allclose(evaluate.pixels(images.split(2), size=4), means, rtol=1e-5)


def test_pca_is_the_best_linear_code_and_is_fitted_on_train():
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((80, 30)) * np.linspace(5, 0.1, 30), rng.standard_normal((20, 30))
    a, b = evaluate.pca(train, test, width=6)
    centred = train - train.mean(0)
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose((a**2).sum(0), s[:6] ** 2, rtol=1e-3)
    np.testing.assert_allclose(np.abs(b), np.abs((test - train.mean(0)) @ vt[:6].T), atol=0.05)
    np.testing.assert_array_equal(b, evaluate.pca(train, test, width=6)[1])


def test_baselines_come_at_the_width_of_the_encoder():
    batches = torch.randn(20, 3, 2, 2).split(8), torch.randn(10, 3, 2, 2).split(8)
    table = evaluate.baseline_features(Noisy(), *batches)
    assert {name: (a.shape, b.shape) for name, (a, b) in table.items()} == {
        "random": ((20, 5), (10, 5)),
        "pixels": ((20, 12), (10, 12)),
        "pca": ((20, 5), (10, 5)),
    }


def test_embedding_does_not_depend_on_the_number_of_threads():
    x, _ = blobs(60)
    with threadpool_limits(1):
        rows, one = evaluate.embedding(x, images=50)
    with threadpool_limits(2):
        np.testing.assert_array_equal(one, evaluate.embedding(x, images=50)[1])
    assert len(np.unique(rows)) == 50 and one.shape == (50, 2) and np.isfinite(one).all()


@pytest.mark.parametrize(
    "x",
    [
        np.ones((40, 8), np.float32),  # t-SNE alone ends the process on these
        np.repeat(blobs(4)[0], 10, axis=0),
        1e-20 * blobs(40)[0],
        1e20 * blobs(40)[0],
        blobs(5)[0],
        blobs(40, d=2, classes=2)[0],
    ],
    ids=["collapsed", "repeated", "minute", "huge", "few", "two wide"],
)
def test_embedding_of_awkward_features(x):
    rows, xy = evaluate.embedding(x)
    assert xy.shape == (len(x), 2) and np.isfinite(xy).all()


def test_monitor_agrees_with_the_evaluation_and_refuses_early():
    (x, y), (val_x, val_y) = blobs(60), blobs(30, seed=1)
    images, val_images = torch.tensor(x).reshape(60, 3, 2, 2), torch.tensor(val_x).reshape(30, 3, 2, 2)
    monitor = evaluate.knn_monitor(images.split(16), y, val_images.split(16), val_y, k=5)
    encoder = nn.Flatten()
    expected = evaluate.knn(x, y, val_x, val_y, k=5)["accuracy"]
    assert monitor(encoder) == monitor(encoder) == expected
    assert evaluate.knn_monitor([], np.full(60, -1), [], val_y) is None
    with pytest.raises(UserError, match=r"evaluate\.k"):
        evaluate.knn_monitor([], y, [], val_y, k=61)


class Scripted(nn.Module):
    """An autoencoder of 1-pixel patches that predicts `table[p]` (b, n, 1) when shown part p of K."""

    def __init__(self, image_size, tables):
        super().__init__()
        self.encoder = build_mae(image_size, 1, 1).encoder
        self.drop, self.tables, self.masks, self.calls = nn.Dropout(0.5), tables, [], 0

    def forward(self, images, choose):
        mask = choose(images)
        self.masks.append(mask)
        assert not self.drop.training and not torch.is_grad_enabled()
        table = self.tables[self.calls % len(self.tables)]
        self.calls += 1
        return Prediction(table[: len(images)], mask)


@settings(max_examples=25, deadline=None)
@given(parts=st.integers(3, 6), b=st.integers(1, 5), rows=st.integers(1, 3), seed=st.integers(0, 999))
def test_spread_and_error_are_those_of_a_slow_loop(parts, b, rows, seed):
    rng = np.random.default_rng(seed)
    images = torch.tensor(rng.standard_normal((b, 1, rows, parts)))
    tables = torch.tensor(rng.standard_normal((parts, b, rows * parts, 1)))
    mae, ratio = Scripted((rows, parts), tables), 1 - 1 / parts
    spread, error = evaluate.prediction_spread(mae, [images], norm_pix=False, ratio=ratio, seed=seed)
    assert mae.drop.training and mae.calls == parts
    shown = sum(1 - mask.hidden for mask in mae.masks)
    assert (shown == 1).all()  # complementary
    for i in range(b):
        variances, errors = [], []
        for j in range(rows * parts):
            hiding = [m for m in range(parts) if mae.masks[m].hidden[i, j]]
            values = np.array([float(tables[m, i, j, 0]) for m in hiding])
            truth = float(images[i].flatten()[j])
            assert len(values) == parts - 1
            variances.append(values.var())
            errors.append(np.mean((values - truth) ** 2))
        np.testing.assert_allclose([spread[i], error[i]], [np.mean(variances), np.mean(errors)], rtol=1e-9)
        assert 0 <= spread[i] <= error[i]


def small_mae():
    torch.manual_seed(0)
    return build_mae(
        (8, 16), 4, 3, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2
    )


def test_consistency_is_seeded_and_does_not_depend_on_batches_or_labels():
    mae, images = small_mae(), torch.randn(13, 3, 8, 16, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    found = evaluate.consistency(mae, [images], norm_pix=True, ratio=0.75, bootstrap=100)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == evaluate.consistency(mae, [images], norm_pix=True, ratio=0.75, bootstrap=100)
    split = evaluate.consistency(mae, images.split(1), norm_pix=True, ratio=0.75, bootstrap=100)
    assert split == pytest.approx(found, rel=1e-4)
    other = evaluate.consistency(mae, [images], norm_pix=True, ratio=0.75, bootstrap=100, seed=1)
    assert other["value"] != found["value"]
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1 and found["parts"] == 4
    assert mae.training and all(p.grad is None for p in mae.parameters())


def test_consistency_asks_for_the_target_the_model_was_trained_on():
    mae, images = small_mae(), 5 + 0.1 * torch.randn(6, 3, 8, 16)
    with torch.no_grad():
        mae.decoder.head.weight.zero_()  # predicts 0: the error is the target's square
    plain, normed = (
        evaluate.consistency(mae, [images], norm_pix=norm, ratio=0.75, bootstrap=10)["error"]
        for norm in (False, True)
    )
    assert plain == pytest.approx(25, rel=0.02) and normed == pytest.approx(47 / 48, rel=1e-3)


@pytest.mark.parametrize(
    "ratio, reason", [(0.5, "one of two masks only"), (0.6, "2.5 disjoint parts"), (2 / 3, "don't divide")]
)
def test_a_ratio_without_three_parts_is_a_reason_and_no_number(ratio, reason):
    found = evaluate.consistency(small_mae(), [torch.randn(2, 3, 8, 16)], norm_pix=True, ratio=ratio)
    assert list(found) == ["skipped"] and reason in found["skipped"]


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0, 1), m=st.integers(1, 200), seed=st.integers(0, 99))
def test_share_interval_is_a_ratio_of_sums(share, m, seed):
    rng = np.random.default_rng(seed)
    whole = rng.exponential(size=m) + 0.1
    same = evaluate.share_interval(share * whole, whole, bootstrap=50, seed=seed)
    assert list(same.values()) == pytest.approx([share] * 3)  # every image agrees: no doubt at all
    part = whole * rng.uniform(size=m)
    found = evaluate.share_interval(part, whole, bootstrap=200, seed=seed)
    assert found["value"] == pytest.approx(part.sum() / whole.sum())
    assert (part / whole).min() <= found["low"] <= found["high"] <= (part / whole).max()
    wide = evaluate.share_interval(7 * part, 7 * whole, bootstrap=200, seed=seed)
    assert wide == pytest.approx(found)


def test_share_interval_covers():
    rng, hits = np.random.default_rng(0), 0
    for seed in range(200):
        whole = rng.exponential(size=100)
        found = evaluate.share_interval(whole * rng.beta(1, 3, 100), whole, bootstrap=300, seed=seed)
        hits += found["low"] <= 0.25 <= found["high"]
    assert 0.88 <= hits / 200 <= 0.99

"""MAE and CL-MAE as a textbook would write them, to measure what our own code saves.

The released method (arXiv 2308.16572) in plain statements: attention matrices written out, patches shuffled
and put back by sorting twice, one optimizer for both networks with requires_grad toggled between the phases,
all n tokens through the frozen MAE in the masker's phase, a Python loop over pairs of images for diversity.
Parameters have the names of ours, so that `load_state_dict` carries weights over.
"""

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """softmax(QKᵀ/√d)V with the whole matrix: (b, n, d) to (b, n, d)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1)) / math.sqrt(d // self.heads)
        attention = attention.softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self, width: int, heads: int, ratio: float, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    """Blocks, then a LayerNorm unless `norm` is False."""

    def __init__(
        self, width: int, depth: int, heads: int, ratio: float = 4.0, eps: float = 1e-6, norm: bool = True
    ):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, ratio, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PatchEmbed(nn.Module):
    """Images (b, c, h, w) to tokens (b, n, d)."""

    def __init__(self, patch: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """Patch embedding with positions (1, n, d), a class token, a trunk."""

    def __init__(self, patch: int, channels: int, positions: Tensor, depth: int, heads: int):
        super().__init__()
        width = positions.shape[-1]
        self.patch_embed = PatchEmbed(patch, channels, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", positions, persistent=False)
        self.trunk = Trunk(width, depth, heads)

    def embed(self, images: Tensor) -> Tensor:
        return self.patch_embed(images) + self.positions

    def forward(self, tokens: Tensor) -> Tensor:
        return self.trunk(torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1))


class Decoder(nn.Module):
    """Latents of the kept patches, in their shuffled order, to predictions of all patches (b, n, p²c)."""

    def __init__(self, width_in: int, values: int, positions: Tensor, depth: int, heads: int):
        super().__init__()
        width = positions.shape[-1]
        self.embed = nn.Linear(width_in, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", positions, persistent=False)
        self.trunk = Trunk(width, depth, heads)
        self.head = nn.Linear(width, values)

    def forward(self, latent: Tensor, restore: Tensor | None = None) -> Tensor:
        x = self.embed(latent)
        if restore is not None:
            b, n = restore.shape
            masks = self.mask_token.repeat(b, n + 1 - x.shape[1], 1)
            shuffled = torch.cat([x[:, 1:], masks], dim=1)
            places = torch.gather(shuffled, 1, restore.unsqueeze(-1).repeat(1, 1, x.shape[-1]))
            x = torch.cat([x[:, :1], places], dim=1)
        x = torch.cat([x[:, :1], x[:, 1:] + self.positions], dim=1)
        return self.head(self.trunk(x))[:, 1:]


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images (b, c, h, w) to patches (b, n, p²c)."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    x = torch.einsum("nchpwq->nhwpqc", x)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


class MAE(nn.Module):
    """Masked autoencoder (arXiv 2111.06377), mask ratio 3/4, standardised targets."""

    def __init__(self, encoder: Encoder, decoder: Decoder, patch: int, ratio: float = 0.75):
        super().__init__()
        self.encoder, self.decoder, self.patch, self.ratio = encoder, decoder, patch, ratio

    def errors(self, images: Tensor, prediction: Tensor) -> Tensor:
        """Mean squared error (b, n) of each patch."""
        target = patchify(images, self.patch)
        mean = target.mean(dim=-1, keepdim=True)
        variance = target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
        return ((prediction - target) ** 2).mean(dim=-1)

    def masked_loss(self, images: Tensor, tokens: Tensor, noise: Tensor) -> Tensor:
        """Keep the patches of lowest noise (b, n); the mean error of the others."""
        b, n, d = tokens.shape
        kept = n - round(n * self.ratio)
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        visible = torch.gather(tokens, 1, shuffle[:, :kept].unsqueeze(-1).repeat(1, 1, d))
        mask = torch.ones([b, n], device=tokens.device, dtype=noise.dtype)
        mask[:, :kept] = 0
        mask = torch.gather(mask, 1, restore)
        error = self.errors(images, self.decoder(self.encoder(visible), restore))
        return (error * mask).sum() / mask.sum()

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return self.masked_loss(images, self.encoder.embed(images), noise)


class Masker(nn.Module):
    """Five blocks over all tokens (b, n, d); the class token says all scores (b, n), high = keep."""

    def __init__(self, n: int, width: int, depth: int = 5, heads: int = 4):
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.trunk = Trunk(width, depth, heads, eps=1e-5, norm=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1)
        return torch.sigmoid(self.head(self.norm(self.trunk(x)[:, 0])))


def gauss(score: Tensor, sigma: float = 0.12) -> Tensor:
    """How undecided scores are, with its released weight."""
    density = torch.exp(-((score - 0.5) ** 2) / (2 * sigma**2))
    return sigma * math.sqrt(2 * math.pi) * density.mean()


def kl(score: Tensor) -> Tensor:
    """How far each image's mean score is from a quarter, summed over the batch."""
    keep = score.mean(dim=1)
    return (keep * torch.log(keep / 0.25) + (1 - keep) * torch.log((1 - keep) / 0.75)).sum()


def diversity_loop(score: Tensor) -> Tensor:
    """How alike the scores (b, n) of two images are, mean over pairs: one pair after the other."""
    total, pairs = 0.0, 0
    for i in range(len(score)):
        for j in range(i + 1, len(score)):
            total = total + torch.exp(-0.1 * torch.norm(score[i] - score[j]))
            pairs += 1
    return total / pairs


def diversity_matrix(score: Tensor) -> Tensor:
    """The same number from all pairs at once."""
    i, j = torch.triu_indices(len(score), len(score), offset=1, device=score.device)
    return torch.exp(-0.1 * torch.norm(score[i] - score[j], dim=1)).mean()


def freeze(frozen: nn.Module, moving: nn.Module) -> None:
    """Toggle requires_grad between two networks."""
    for parameter in frozen.parameters():
        parameter.requires_grad = False
    for parameter in moving.parameters():
        parameter.requires_grad = True


class CLMAE(nn.Module):
    """Curriculum-learned masking (arXiv 2308.16572): an MAE and its masker, one phase each."""

    def __init__(self, mae: MAE, masker: Masker):
        super().__init__()
        self.mae, self.masker = mae, masker

    def mae_phase(self, images: Tensor) -> Tensor:
        """Phase A: the masker stands still and says what to keep."""
        freeze(self.masker, self.mae)
        tokens = self.mae.encoder.embed(images)
        score = self.masker(tokens)
        return self.mae.masked_loss(images, tokens, -score)

    def masker_phase(self, images: Tensor, factor: float, diversity=diversity_loop) -> Tensor:
        """Phase B: the MAE stands still and sees every token multiplied by its score."""
        freeze(self.mae, self.masker)
        tokens = self.mae.encoder.embed(images)
        score = self.masker(tokens)
        latent = self.mae.encoder(tokens * score.unsqueeze(-1))
        error = self.mae.errors(images, self.mae.decoder(latent))
        reconstruction = (error * (1 - score)).sum() / (1 - score).sum()
        return factor * reconstruction + gauss(score) + 0.1 * kl(score) + 2.0 * diversity(score)

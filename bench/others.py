"""The same MAE from other libraries, with our weights carried over. Needs those libraries."""

from functools import partial

import torch
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from clmae.mae import MAE
from clmae.masking import keep_count

EPS = 1e-6  # of every LayerNorm in encoder and decoder, as in the MAE paper's code
RATIO = 0.75


def renamed(tensors: dict[str, Tensor], names: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors under other names: each pair of `names` is replaced in turn, the first that begins a name."""
    found = {}
    for name, value in tensors.items():
        ours, theirs = next((pair for pair in names if name.startswith(pair[0])), ("", ""))
        found[theirs + name.removeprefix(ours)] = value
    return found


def with_class_place(positions: Tensor) -> Tensor:
    """Positions (n, d) as others store them: (1, 1 + n, d), zero for the class token."""
    return torch.cat([positions.new_zeros(1, positions.shape[1]), positions])[None]


def load(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load `tensors` and nothing else; ValueError if a trainable parameter was not among them."""
    left, strange = net.load_state_dict(tensors, strict=False)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    if strange or trained & set(left):
        raise ValueError(
            f"weights don't fit: {sorted(strange)} unknown, {sorted(trained & set(left))} missing"
        )


class HuggingFace(nn.Module):
    """ViTMAEForPreTraining of transformers, of the sizes of `ours` and with its weights."""

    # ours → theirs; query, key and value are one matrix here and three there
    NAMES = [
        ("encoder.patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
        ("encoder.cls", "vit.embeddings.cls_token"),
        ("encoder.trunk.blocks.", "vit.layers."),
        ("encoder.trunk.norm.", "vit.layernorm."),
        ("decoder.embed.", "decoder.decoder_embed."),
        ("decoder.trunk.blocks.", "decoder.decoder_layers."),
        ("decoder.trunk.norm.", "decoder.decoder_norm."),
        ("decoder.head.", "decoder.decoder_pred."),
        ("", ""),
    ]
    WITHIN = {
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
        ".attn.proj.": ".attention.o_proj.",
    }

    def __init__(self, ours: MAE):
        super().__init__()
        encoder, decoder = ours.encoder, ours.decoder
        self.net = ViTMAEForPreTraining(
            ViTMAEConfig(
                image_size=encoder.image_size[0],
                patch_size=encoder.patch_size[0],
                num_channels=encoder.channels,
                hidden_size=encoder.width,
                num_hidden_layers=encoder.trunk_settings["depth"],
                num_attention_heads=encoder.trunk_settings["heads"],
                intermediate_size=int(encoder.width * encoder.trunk_settings["mlp_ratio"]),
                decoder_hidden_size=decoder.width,
                decoder_num_hidden_layers=decoder.settings["depth"],
                decoder_num_attention_heads=decoder.settings["heads"],
                decoder_intermediate_size=int(decoder.width * decoder.settings["mlp_ratio"]),
                layer_norm_eps=EPS,
                mask_ratio=RATIO,
                norm_pix_loss=True,
            )
        )
        load(self.net, self.weights(ours))

    def weights(self, ours: MAE) -> dict[str, Tensor]:
        """Our weights and positions by their names."""
        tensors = {
            "vit.embeddings.position_embeddings": with_class_place(ours.encoder.positions),
            "decoder.decoder_pos_embed": with_class_place(ours.decoder.positions),
        }
        for name, value in renamed(ours.state_dict(), self.NAMES).items():
            for a, b in self.WITHIN.items():
                name = name.replace(a, b)
            if ".attn.qkv." in name:
                for which, third in zip("qkv", value.chunk(3)):
                    tensors[name.replace(".attn.qkv.", f".attention.{which}_proj.")] = third
            else:
                tensors[name] = value
        return tensors

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """The loss on images (b, c, h, w), the patches of lowest noise (b, n) being visible."""
        return self.net(images, noise=noise).loss


class Lightly(nn.Module):
    """lightly's building blocks put together as its MAE example does, of the sizes and weights of `ours`."""

    NAMES = [
        ("encoder.cls", "backbone.vit.cls_token"),
        ("encoder.trunk.", "backbone.vit."),
        ("encoder.", "backbone.vit."),
        ("decoder.embed.", "embed."),
        ("decoder.head.", "head."),
        ("decoder.trunk.", "decoder."),
        ("", ""),
    ]

    def __init__(self, ours: MAE):
        super().__init__()
        encoder, decoder = ours.encoder, ours.decoder
        self.patch, self.kept = encoder.patch_size[0], keep_count(encoder.n, RATIO)
        vit = VisionTransformer(
            img_size=encoder.image_size,
            patch_size=self.patch,
            in_chans=encoder.channels,
            num_classes=0,
            embed_dim=encoder.width,
            depth=encoder.trunk_settings["depth"],
            num_heads=encoder.trunk_settings["heads"],
            mlp_ratio=encoder.trunk_settings["mlp_ratio"],
            norm_layer=partial(nn.LayerNorm, eps=EPS),
        )
        self.backbone = MaskedVisionTransformerTIMM(vit)
        self.backbone.mask_token.requires_grad = False  # of other methods; an MAE has none here
        self.embed = nn.Linear(encoder.width, decoder.width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=encoder.n,
            embed_dim=decoder.width,
            depth=decoder.settings["depth"],
            num_heads=decoder.settings["heads"],
            mlp_ratio=decoder.settings["mlp_ratio"],
        )
        self.head = nn.Linear(decoder.width, self.patch**2 * encoder.channels)
        positions = {
            "backbone.vit.pos_embed": with_class_place(encoder.positions),
            "decoder.pos_embed": with_class_place(decoder.positions),
        }
        load(self, renamed(ours.state_dict(), self.NAMES) | positions)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """The loss on images (b, c, h, w), the patches of lowest noise (b, n) being visible."""
        order = noise.argsort(dim=1) + 1  # place 0 is the class token's
        keep = torch.cat([torch.zeros_like(order[:, :1]), order[:, : self.kept]], dim=1)
        hidden = order[:, self.kept :]
        x = self.embed(self.backbone.encode(images, idx_keep=keep))
        places = utils.repeat_token(self.decoder.mask_token, (len(images), self.decoder.sequence_length))
        places = utils.set_at_index(places, keep, x.type_as(places))
        decoded = self.decoder.decode(self.decoder.add_pos_embed(places))
        prediction = self.head(utils.get_at_index(decoded, hidden))
        target = utils.get_at_index(utils.patchify(images, self.patch), hidden - 1)
        return nn.functional.mse_loss(prediction, utils.normalize_mean_var(target))

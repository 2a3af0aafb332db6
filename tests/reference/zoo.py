"""Small networks of the kinds that people deploy, for matrix.py: a few tens of thousands of parameters each.

Activations are smooth where the original's are; where it has ReLU and max pooling, matrix.py looks for a batch that stays clear of
the kinks. Dropout is there with probability 0: its nodes are in the files, and both sides compute the same.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import SEED


class Attention(nn.Module):
    """Self-attention as BERT writes it out: matrix products, a mask that is added, Softmax, Dropout."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.0)

    def split(self, x):
        return x.view(*x.shape[:-1], self.heads, self.size).permute(0, 2, 1, 3)

    def forward(self, x, mask):
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = q @ k.transpose(-1, -2) / self.size**0.5 + mask
        context = (self.dropout(scores.softmax(-1)) @ v).permute(0, 2, 1, 3).contiguous()
        return context.view(*context.shape[:-2], self.heads * self.size)


class BertLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention, self.output = Attention(width, heads), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, mask):
        x = self.norm1(self.dropout(self.output(self.attention(x, mask))) + x)
        return self.norm2(self.dropout(self.narrow(F.gelu(self.wide(x)))) + x)


class Bert(nn.Module):
    """Devlin et al. 2019: embeddings of words, positions and segments, post-norm layers, a pooler on the first token."""

    def __init__(self, words=60, longest=16, width=24, heads=4, layers=2, classes=5):
        super().__init__()
        self.words, self.positions, self.segments = nn.Embedding(words, width), nn.Embedding(longest, width), nn.Embedding(2, width)
        self.register_buffer("position_ids", torch.arange(longest)[None], persistent=False)
        self.norm, self.dropout = nn.LayerNorm(width, eps=1e-12), nn.Dropout(0.0)
        self.layers = nn.ModuleList(BertLayer(width, heads) for _ in range(layers))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, input_ids, attention_mask, token_type_ids):
        positions = self.position_ids[:, : input_ids.shape[1]]
        x = self.words(input_ids) + self.segments(token_type_ids) + self.positions(positions)
        x = self.dropout(self.norm(x))
        mask = attention_mask[:, None, None, :].to(x.dtype)
        mask = (1.0 - mask) * torch.finfo(torch.float32).min
        for layer in self.layers:
            x = layer(x, mask)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class VitBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Dropout(0.0), nn.Linear(2 * width, width))
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)
        x = x + self.scale1 * self.proj(y)
        return x + self.scale2 * self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Dosovitskiy et al. 2021, with a class token and layer scale."""

    def __init__(self, size=16, patch=4, width=24, heads=4, layers=2, classes=5):
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(VitBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, image):
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W], written out."""

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNextBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.narrow(F.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """Liu et al. 2022: two stages of two blocks."""

    def __init__(self, widths=(16, 32), classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 2, 2), ChannelNorm(widths[0], eps=1e-6))
        self.stage1 = nn.Sequential(*(ConvNextBlock(widths[0]) for _ in range(2)))
        self.down = nn.Sequential(ChannelNorm(widths[0], eps=1e-6), nn.Conv2d(widths[0], widths[1], 2, 2))
        self.stage2 = nn.Sequential(*(ConvNextBlock(widths[1]) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(widths[1], eps=1e-6), nn.Linear(widths[1], classes)

    def forward(self, image):
        x = self.stage2(self.down(self.stage1(self.stem(image))))
        return self.head(self.norm(x.mean([-2, -1])))


def conv_norm(cin, cout):
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())


class Unet(nn.Module):
    """Ronneberger et al. 2015: one way up is a transposed convolution, the other a bilinear Resize to the skip's size."""

    def __init__(self, width=6, classes=3):
        super().__init__()
        self.down1, self.down2 = conv_norm(3, width), conv_norm(width, 2 * width)
        self.middle = nn.Sequential(conv_norm(2 * width, 2 * width), conv_norm(2 * width, 2 * width))
        self.up2 = nn.ConvTranspose2d(2 * width, 2 * width, 2, 2, bias=False)
        self.up_norm = nn.BatchNorm2d(2 * width)
        self.join2, self.join1 = conv_norm(4 * width, 2 * width), conv_norm(3 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image):
        a = self.down1(image)
        b = self.down2(F.max_pool2d(a, 2))
        x = self.middle(F.max_pool2d(b, 2))
        x = self.join2(torch.cat([self.up_norm(self.up2(x)), b], 1))
        x = F.interpolate(x, size=a.shape[2:], mode="bilinear", align_corners=False)
        return self.head(self.join1(torch.cat([x, a], 1)))


class BiLstm(nn.Module):
    """Two layers in both directions over embedded words, batch first; the mean over time is classified."""

    def __init__(self, words=40, width=12, hidden=16, classes=4):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, hidden, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, tokens):
        return self.head(self.lstm(self.words(tokens))[0].mean(1))


class GruTagger(nn.Module):
    """One label a word, from a GRU in both directions with learned first states."""

    def __init__(self, words=40, width=16, hidden=20, classes=6):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.gru = nn.GRU(width, hidden, bidirectional=True, batch_first=True)
        self.first = nn.Parameter(torch.zeros(2, 1, hidden))
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, tokens):
        x = self.words(tokens)
        return self.head(self.gru(x, self.first.expand(-1, x.shape[0], -1).contiguous())[0])


class Cnn3d(nn.Module):
    """Convolutions over space and time, as for video or volumes."""

    def __init__(self, width=8, classes=4):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(1, width, 3, padding=1), nn.BatchNorm3d(width), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(width, 2 * width, 3, padding=1), nn.BatchNorm3d(2 * width), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(2 * width, 2 * width, (3, 1, 1), padding=(1, 0, 0), groups=2), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, classes)

    def forward(self, volume):
        return self.head(self.features(volume).flatten(1))


class Vae(nn.Module):
    """Kingma & Welling 2014: the noise is an input."""

    def __init__(self, pixels=64, hidden=48, latent=6):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.BatchNorm1d(hidden), nn.SiLU())
        self.mean, self.spread = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Softplus(), nn.Linear(hidden, pixels))

    def forward(self, pixels, noise):
        h = self.encoder(pixels)
        mean, log_var = self.mean(h), self.spread(h)
        return self.decoder(mean + noise * torch.exp(0.5 * log_var)), mean, log_var


class VaeLoss(nn.Module):
    """Reconstruction (sigmoid cross-entropy, summed over the pixels) plus the divergence from the standard normal; means over the batch."""

    def forward(self, reconstruction, mean, log_var, target):
        entropy = F.binary_cross_entropy_with_logits(reconstruction, target, reduction="none").sum(1)
        divergence = -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).sum(1)
        return (entropy + divergence).mean()


class Transformer(nn.Module):
    """PyTorch's own encoder layers: one matrix for queries, keys and values; pre-norm."""

    def __init__(self, words=40, width=24, classes=4):
        super().__init__()
        self.words = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens):
        return self.head(self.encoder(self.words(tokens)).mean(1))


class RmsNorm(nn.RMSNorm):
    """Written out for the exporter that does not know it."""

    def forward(self, x):
        if not torch.jit.is_tracing():
            return super().forward(x)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class DecoderLayer(nn.Module):
    def __init__(self, width, heads, groups):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm1, self.norm2 = RmsNorm(width, eps=1e-6), RmsNorm(width, eps=1e-6)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x, cos, sin):
        n, t, c = x.shape

        def turned(y):
            a, b = y.chunk(2, -1)
            return y * cos + torch.cat([-b, a], -1) * sin

        y = self.norm1(x)
        q = turned(self.q(y).view(n, t, self.heads, self.size).transpose(1, 2))
        k = turned(self.k(y).view(n, t, self.groups, self.size).transpose(1, 2))
        v = self.v(y).view(n, t, self.groups, self.size).transpose(1, 2)
        k, v = (z.repeat_interleave(self.heads // self.groups, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, c)
        x = x + self.o(y)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Touvron et al. 2023: RMS norms, rotary positions, grouped queries, gated layers; the head is the embedding."""

    def __init__(self, words=40, width=24, heads=4, groups=2, layers=2):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, groups) for _ in range(layers))
        self.norm, self.head = RmsNorm(width, eps=1e-6), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        size = width // heads
        self.register_buffer("frequency", 100.0 ** (-torch.arange(0, size, 2) / size), persistent=False)

    def forward(self, tokens):
        x = self.words(tokens)
        angle = torch.arange(tokens.shape[1], device=x.device).to(x.dtype)[:, None] * self.frequency
        angle = torch.cat([angle, angle], -1)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        return self.head(self.norm(x))


class Wave(nn.Module):
    """Parts of audio networks: gated 1-D convolutions, group and instance norms, PReLU, a way up, reflected padding."""

    def __init__(self, width=12, classes=4):
        super().__init__()
        self.first = nn.Conv1d(1, 2 * width, 5, 2, padding=2, padding_mode="reflect")
        self.norm1 = nn.GroupNorm(3, width)
        self.second = nn.Conv1d(width, width, 3, padding=2, dilation=2, groups=4)
        self.norm2, self.act = nn.InstanceNorm1d(width, affine=True), nn.PReLU(width)
        self.up = nn.ConvTranspose1d(width, width, 4, 2, 1)
        self.norm3, self.head = nn.BatchNorm1d(width), nn.Linear(width, classes)

    def forward(self, wave):
        x = self.norm1(F.glu(self.first(wave), 1))
        x = self.act(self.norm2(self.second(x))) + x
        x = F.leaky_relu(self.norm3(self.up(F.avg_pool1d(x, 2))), 0.1)
        return self.head(x.std(-1) + F.adaptive_max_pool1d(x, 1)[..., 0])


@dataclasses.dataclass
class Case:
    name: str
    make: Callable[[], nn.Module]
    data: Callable[[np.random.Generator, int], tuple[dict, np.ndarray]]
    """Inputs by name in the order of `forward`, and the target."""
    outputs: tuple = ("logits",)
    loss: str = "cross-entropy"
    """As on retune's command line, or `graph`: the module `loss_module` is exported too."""
    loss_module: type[nn.Module] | None = None
    class_axis: int = 1
    batch: int = 4
    open_axes: dict = dataclasses.field(default_factory=dict)
    """Axes beside the batch that the file leaves open: {input: {axis: name}}; each a multiple of `multiple`."""
    multiple: int = 1

    def loss_of(self, outputs, target):
        if self.loss_module is not None:
            return self.loss_module()(*outputs, target)
        return F.cross_entropy(outputs[0].movedim(self.class_axis, 1), target)


def tokens(rng, n, words, length):
    return rng.integers(0, words, (n, length))


def bert_data(rng, n):
    lengths = rng.integers(6, 13, n)
    mask = (np.arange(12)[None] < lengths[:, None]).astype(np.int64)
    segments = (np.arange(12)[None] >= lengths[:, None] // 2).astype(np.int64)
    return {"input_ids": tokens(rng, n, 60, 12), "attention_mask": mask, "token_type_ids": segments}, rng.integers(0, 5, n)


def image_data(classes, size=16, dense=False):
    def data(rng, n):
        labels = rng.integers(0, classes, (n, size, size) if dense else n)
        return {"image": rng.normal(0, 1, (n, 3, size, size)).astype(np.float32)}, labels

    return data


def vae_data(rng, n):
    pixels = rng.random((n, 64), np.float32)
    return {"pixels": pixels, "noise": rng.normal(0, 1, (n, 6)).astype(np.float32)}, pixels.copy()


CASES = [
    Case("bert", Bert, bert_data, open_axes={k: {1: "length"} for k in ("input_ids", "attention_mask", "token_type_ids")}),
    Case("vit", Vit, image_data(5), batch=3),
    Case("convnext", ConvNext, image_data(5)),
    Case("unet", Unet, image_data(3, 12, dense=True), open_axes={"image": {2: "height", 3: "width"}}, multiple=4, batch=3),
    Case("bilstm", BiLstm, lambda rng, n: ({"tokens": tokens(rng, n, 40, 9)}, rng.integers(0, 4, n)), open_axes={"tokens": {1: "length"}}),
    Case("gru_tagger", GruTagger, lambda rng, n: ({"tokens": tokens(rng, n, 40, 9)}, rng.integers(0, 6, (n, 9))), class_axis=2),
    Case("cnn3d", Cnn3d, lambda rng, n: ({"volume": rng.normal(0, 1, (n, 1, 6, 10, 10)).astype(np.float32)}, rng.integers(0, 4, n))),
    Case("transformer", Transformer, lambda rng, n: ({"tokens": tokens(rng, n, 40, 9)}, rng.integers(0, 4, n)), open_axes={"tokens": {1: "length"}}),
    Case("decoder", Decoder, lambda rng, n: ({"tokens": tokens(rng, n, 40, 9)}, tokens(rng, n, 40, 9)), class_axis=2, open_axes={"tokens": {1: "length"}}),
    Case("wave", Wave, lambda rng, n: ({"wave": rng.normal(0, 1, (n, 1, 64)).astype(np.float32)}, rng.integers(0, 4, n))),
    Case("vae", Vae, vae_data, outputs=("reconstruction", "mean", "log_var"), loss="graph", loss_module=VaeLoss, batch=8),
]  # fmt: skip


def filled(case, batches=8):
    """The network with random parameters no two elements of which are equal, and running statistics from random data.

    Distinct elements tell where each element of a file's tensors came from, however an exporter has transposed, cut or joined them.
    """
    torch.manual_seed(SEED)
    net = case.make()
    rng = np.random.default_rng(SEED)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim < 2 or name in ("token", "positions", "first"):
                scale = name.endswith("weight") or "scale" in name or "gamma" in name
                p.copy_(torch.from_numpy(rng.normal(1.0 if scale else 0.0, 0.2, p.shape)))
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for m in norms:
            m.momentum = None  # the plain average
        net.train()
        for _ in range(batches if norms else 0):
            net(*(torch.from_numpy(v) for v in case.data(rng, 16)[0].values()))
        for m in norms:
            m.momentum = 0.1
        distinct([*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())])
    return net.eval()


def distinct(tensors):
    """Moves elements by float32 roundings until no two have the same magnitude, and none is next to nothing."""
    flat = torch.cat([t.detach().reshape(-1) for t in tensors]).numpy().copy()
    small = np.abs(flat) < 1e-5
    flat[small] = np.linspace(1e-5, 2e-5, small.sum(), dtype=np.float32)
    while True:
        order = np.argsort(np.abs(flat), kind="stable")
        same = np.flatnonzero(np.abs(flat[order[1:]]) == np.abs(flat[order[:-1]]))
        if len(same) == 0:
            break
        at = order[same + 1]
        flat[at] = np.nextafter(flat[at], np.copysign(np.float32(np.inf), flat[at]))
    for t, part in zip(tensors, np.split(flat, np.cumsum([t.numel() for t in tensors])[:-1]), strict=True):
        t.data.copy_(torch.from_numpy(part.reshape(t.shape)))

"""The models that are measured: random weights, synthetic data, nothing is downloaded.

A `Case` builds a module whose forward takes a batch and returns what the step needs: the loss in training (so that the
loss is inside the compiled region), the model's result in inference. Dropout is as the architecture has it by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One model at one batch size.

    Attributes
    ----------
    gigabytes:
        Roughly what an eager step and the model need together, in 1e9 bytes: how many cases fit on a device at once.
    random:
        Whether the training step draws random numbers (dropout, stochastic depth), so that a compiled step agrees
        with eager only under eager's own generator.
    """

    name: str
    device: str
    training: bool
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    gigabytes: float = 1.0
    random: bool = False

    def make(self) -> tuple[nn.Module, Batch]:
        """The module in its mode, and a batch, both on the device and the same for the same seed."""
        torch.manual_seed(0)
        with torch.device(self.device):
            module = self.build()
            batch = self.batch()
        module = module.to(self.device)
        return (module.train() if self.training else module.eval()), batch


class LanguageModel(nn.Module):
    """Next-token loss of a transformers causal or masked language model; with ``loss=False``, its logits."""

    def __init__(self, model: nn.Module, *, loss: bool = True, shift: bool = True) -> None:
        super().__init__()
        self.model, self.loss, self.shift = model, loss, shift

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        arguments = {"use_cache": False} if self.shift else {}
        if not self.loss:
            return self.model(input_ids=tokens, **arguments).logits  # type: ignore[no-any-return]
        return self.model(input_ids=tokens, labels=labels, **arguments).loss  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """Cross entropy of an image classifier under autocast; with ``loss=False``, its logits."""

    def __init__(self, model: nn.Module, *, loss: bool = True, amp: bool = False, device: str = "cpu") -> None:
        super().__init__()
        self.model, self.loss, self.amp, self.device = model, loss, amp, device

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.amp):
            result = self.model(images)
            logits = result if isinstance(result, Tensor) else result.logits
            if not self.loss:
                return logits  # type: ignore[no-any-return]
            assert labels is not None
            return functional.cross_entropy(logits, labels)


def tokens(vocabulary: int, batch: int, length: int, *, labels: bool = True) -> Callable[[], Batch]:
    def make() -> Batch:
        ids = torch.randint(0, vocabulary, (batch, length))
        return (ids, ids.clone()) if labels else (ids,)

    return make


def images(
    batch: int, size: int, classes: int = 1000, *, labels: bool = True, dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Callable[[], Batch]:  # fmt: skip
    def make() -> Batch:
        pixels = torch.randn(batch, 3, size, size, dtype=dtype)
        if channels_last:
            pixels = pixels.to(memory_format=torch.channels_last)
        return (pixels, torch.randint(0, classes, (batch,))) if labels else (pixels,)

    return make


# -- language models -----------------------------------------------------------------------------------------------


def gpt2(dtype: torch.dtype, **config: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        # without a loss type that it knows, transformers warns while it is traced, which breaks the graph at the loss
        model = GPT2LMHeadModel(GPT2Config(**config)).to(dtype)
        model.loss_type = "ForCausalLM"
        return LanguageModel(model)

    return build


def llama(dtype: torch.dtype, *, loss: bool = True, **config: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LanguageModel(LlamaForCausalLM(LlamaConfig(**config)).to(dtype), loss=loss)

    return build


def bert(dtype: torch.dtype, **config: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        return LanguageModel(BertForMaskedLM(BertConfig(**config)).to(dtype), shift=False)

    return build


#: 0.85 billion parameters: 16 layers, 16 query heads of 128 over 4 key and value heads.
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
BERT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
SMALL_LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


# -- image models on a GPU: timm, torchvision ----------------------------------------------------------------------


def timm_model(name: str, *, loss: bool = True, amp: bool = True, dtype: torch.dtype = torch.float32, **arguments: int):  # type: ignore[no-untyped-def]
    def build() -> nn.Module:
        import timm

        return Classifier(timm.create_model(name, **arguments).to(dtype), loss=loss, amp=amp, device="cuda")

    return build


def resnet50(*, loss: bool = True, amp: bool = True, dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import resnet50 as make

        model = make().to(dtype).to(memory_format=torch.channels_last)
        return Classifier(model, loss=loss, amp=amp, device="cuda")

    return build


# -- image models on a CPU: transformers ---------------------------------------------------------------------------


def small_images(kind: str, *, loss: bool = True, channels_last: bool = False) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = SMALL[kind]()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Classifier(model, loss=loss)

    return build


def _small_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768, image_size=112,
            num_labels=100,
        )
    )  # fmt: skip


def _small_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="bottleneck",
            num_labels=100,
        )
    )  # fmt: skip


def _small_convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[48, 96, 192, 384], depths=[2, 2, 4, 2], image_size=112, num_labels=100)
    )


def _small_efficientnet() -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    # the architecture of B0; dropout and drop connect off so that the step needs no random numbers
    return EfficientNetForImageClassification(
        EfficientNetConfig(
            width_coefficient=0.5, depth_coefficient=0.5, image_size=112, hidden_dim=640, dropout_rate=0.0,
            drop_connect_rate=0.0, num_labels=100,
        )
    )  # fmt: skip


def _small_swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(
            image_size=128, patch_size=4, embed_dim=48, depths=[2, 2, 2, 2], num_heads=[2, 4, 8, 16], window_size=4,
            drop_path_rate=0.0, num_labels=100,
        )
    )  # fmt: skip


SMALL: dict[str, Callable[[], nn.Module]] = {
    "vit": _small_vit,
    "resnet": _small_resnet,
    "convnext": _small_convnext,
    "efficientnet": _small_efficientnet,
    "swin": _small_swin,
}

# -- the catalogue -------------------------------------------------------------------------------------------------

BF16 = torch.bfloat16
F32 = torch.float32

_CASES = (
    Case("gpt2", "cuda", True, gpt2(BF16), tokens(50257, 16, 1024), 22, random=True),
    Case("llama-0.9b", "cuda", True, llama(BF16, **LLAMA), tokens(32000, 4, 2048), 21),
    Case("bert-large", "cuda", True, bert(BF16, **BERT_LARGE), tokens(30522, 16, 512), 28, random=True),
    Case("vit-l16", "cuda", True, timm_model("vit_large_patch16_224"), images(64, 224), 17),
    Case("resnet50", "cuda", True, resnet50(), images(256, 224, channels_last=True), 16),
    Case("convnext-b", "cuda", True, timm_model("convnext_base"), images(64, 224), 12),
    Case("efficientnet-b3", "cuda", True, timm_model("efficientnet_b3"), images(64, 288), 12),
    Case("swin-b", "cuda", True, timm_model("swin_base_patch4_window7_224"), images(32, 224), 8, random=True),
    Case("llama-prefill", "cuda", False, llama(BF16, loss=False, **LLAMA), tokens(32000, 8, 2048, labels=False), 6),
    Case(
        "resnet50-inference", "cuda", False, resnet50(loss=False),
        images(256, 224, labels=False, channels_last=True), 4,
    ),
    Case("vit-l16-inference", "cuda", False, timm_model("vit_large_patch16_224", loss=False),
         images(256, 224, labels=False), 6),
    # -- small versions of the same on a CPU
    Case(
        "gpt2", "cpu", True, gpt2(F32, n_layer=4, n_embd=256, n_head=4, vocab_size=4096, n_positions=256),
        tokens(4096, 4, 256), random=True,
    ),
    Case("llama", "cpu", True, llama(F32, **SMALL_LLAMA), tokens(4096, 4, 256)),
    Case(
        "bert", "cpu", True,
        bert(F32, vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024),
        tokens(4096, 8, 128), random=True,
    ),
    Case("vit", "cpu", True, small_images("vit"), images(16, 112, 100)),
    Case("resnet", "cpu", True, small_images("resnet", channels_last=True), images(8, 112, 100, channels_last=True)),
    Case("convnext", "cpu", True, small_images("convnext"), images(8, 112, 100)),
    Case("efficientnet", "cpu", True, small_images("efficientnet"), images(8, 112, 100)),
    Case("swin", "cpu", True, small_images("swin"), images(8, 128, 100)),
    Case("llama-prefill", "cpu", False, llama(F32, loss=False, **SMALL_LLAMA), tokens(4096, 8, 256, labels=False)),
    Case(
        "resnet-inference", "cpu", False, small_images("resnet", loss=False, channels_last=True),
        images(16, 112, labels=False, channels_last=True),
    ),
    Case("vit-inference", "cpu", False, small_images("vit", loss=False), images(32, 112, labels=False)),
)  # fmt: skip

CASES: dict[tuple[str, str], Case] = {(c.device, c.name): c for c in _CASES}


def cases(device: str, names: list[str] | None = None) -> list[Case]:
    """The cases of a device, in the catalogue's order.

    Raises
    ------
    KeyError
        For a name that is not in the catalogue.
    """
    found = [c for c in _CASES if c.device == device]
    if not names:
        return found
    for name in names:
        if (device, name) not in CASES:
            raise KeyError(f"no model {name!r} on {device}; models are {', '.join(c.name for c in found)}")
    return [CASES[device, name] for name in names]

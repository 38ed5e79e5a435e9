"""Small models of transformers, whole: training and inference against eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.models import Classifier, LanguageModel
from tests.models.against_eager import check

transformers = pytest.importorskip("transformers")


def gpt2(dropout: float = 0.0) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=48, n_head=3, vocab_size=97, n_positions=32, bos_token_id=0, eos_token_id=1,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return LanguageModel(model)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LanguageModel(transformers.LlamaForCausalLM(config))


def bert(dropout: float = 0.0) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return LanguageModel(transformers.BertForMaskedLM(config), shift=False)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80, image_size=32, patch_size=8,
        num_labels=7,
    )  # fmt: skip
    return Classifier(transformers.ViTForImageClassification(config))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], layer_type="bottleneck", num_labels=7
    )
    return Classifier(transformers.ResNetForImageClassification(config))


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, image_size=32, num_labels=7)
    return Classifier(transformers.ConvNextForImageClassification(config))


def efficientnet() -> nn.Module:
    config = transformers.EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320, dropout_rate=0.0,
        drop_connect_rate=0.0, num_labels=7,
    )  # fmt: skip
    return Classifier(transformers.EfficientNetForImageClassification(config))


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0,
        num_labels=7,
    )  # fmt: skip
    return Classifier(transformers.SwinForImageClassification(config))


LANGUAGE = {"gpt2": gpt2, "llama": llama, "bert": bert}
IMAGES = {"vit": vit, "resnet": resnet, "convnext": convnext, "efficientnet": efficientnet, "swin": swin}


def tokens(length: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 97, (2, length))
    return ids, ids.clone()


def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 32, 32), torch.randint(0, 7, (4,))


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_model_trains(name: str) -> None:
    check(LANGUAGE[name](), tokens())


@pytest.mark.parametrize("name", IMAGES)
def test_image_model_trains(name: str) -> None:
    check(IMAGES[name](), pixels())


@pytest.mark.parametrize("build", [gpt2, bert])
def test_dropout_is_eagers_where_asked_for(build: Callable[[float], nn.Module]) -> None:
    check(build(0.1), tokens(), random="eager")


@pytest.mark.parametrize("name", ["gpt2", "llama", "resnet"])
def test_inference(name: str) -> None:
    model = {**LANGUAGE, **IMAGES}[name]()
    model.loss = False
    check(model, (tokens() if name in LANGUAGE else pixels())[:1], training=False)


def test_inference_mode_with_inference_tensors() -> None:
    model = llama()
    model.loss = False
    with torch.inference_mode():
        check(model, tokens()[:1], training=False)


def test_bfloat16_weights() -> None:
    check(llama().to(torch.bfloat16), tokens(), dtype=torch.bfloat16)


def test_autocast() -> None:
    model = vit()
    model.amp = True
    check(model, pixels(), dtype=torch.bfloat16)


def test_channels_last() -> None:
    model = resnet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = pixels()
    check(model, (images.to(memory_format=torch.channels_last), labels))


def test_dynamic_length() -> None:
    """One compiled model, several lengths."""
    model = llama()
    compiled = check(model, tokens(16), dynamic=True)
    for length in (9, 23):
        ids, labels = tokens(length)
        torch.testing.assert_close(compiled(ids, labels), model(ids, labels), rtol=1e-4, atol=1e-5)


def test_poison_finds_nothing() -> None:
    """Bytes are overwritten when the plan frees them: a plan that frees too early gives a wrong answer here."""
    check(gpt2(), tokens(), poison=True)


def test_activation_checkpointing() -> None:
    model = llama()
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    check(model, tokens())


def test_optimizer_steps_lower_the_loss_as_eager_does() -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = gpt2().train()
        function = torch.compile(model, backend="memplan") if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids, labels = tokens()
        held = []
        for _ in range(5):
            loss = function(ids, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            held.append(float(loss.detach()))
        losses.append(held)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[1][-1] < losses[1][0]

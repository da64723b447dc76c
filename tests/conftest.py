"""Fixtures for all tests: a home for each test, and tiny random models that pass the whole chain in seconds."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
SPECIAL_TOKENS = {
    "llama": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "phi3": ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}
TEXT = (
    "You are a helpful assistant. Your output should only be one of the five choices.",
    "Answer the following multiple-choice question by selecting the correct option.",
    "Question: Where does the baker keep the bread warm?\nAnswer Choices:\n(A) oven\n(B) river\n(C) cloud",
    "A person who is tired after work would like to rest in a quiet room, wouldn't they?",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DISTILLERY_HOME in a folder of this test's own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("DISTILLERY_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model(arch)`: the folder of a random 2-layer model with a 512-token tokenizer; arch is llama or phi3."""

    @cache
    def build(arch: str) -> Path:
        folder = tmp_path_factory.mktemp(f"tiny-{arch}")
        _tiny_tokenizer(arch).save_pretrained(folder)
        _tiny_weights(arch).save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_onnx(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_onnx(arch, precision="fp32")`: the tiny model for ONNX Runtime GenAI; precision is fp32 or int4."""

    @cache
    def export(arch: str, precision: str = "fp32") -> Path:
        from onnxruntime_genai.models.builder import create_model

        folder = tmp_path_factory.mktemp(f"tiny-{arch}-{precision}")
        scratch = tmp_path_factory.mktemp("builder-cache")
        source = str(tiny_model(arch))
        create_model(arch, source, str(folder), precision, "cpu", str(scratch), hf_remote=False)
        return folder

    return export


def _tiny_tokenizer(arch: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL_TOKENS[arch]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=list(special), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    end = "<|im_end|>" if arch == "llama" else "<|end|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token="<|endoftext|>")
    fast.chat_template = CHATML if arch == "llama" else PHI
    return fast


def _tiny_weights(arch: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

    shape = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": len(SPECIAL_TOKENS[arch]) - 1,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    if arch == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    return Phi3ForCausalLM(Phi3Config(original_max_position_embeddings=1024, **shape)).eval()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """In CI, a test that was skipped or failed as expected has failed, unless it needs a GPU or an Azure account."""
    outcome = yield
    report = outcome.get_result()
    exempt = item.get_closest_marker("gpu") or item.get_closest_marker("azure_live")
    if os.environ.get("CI") and report.skipped and not exempt:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped or expected to fail, which is an error in CI: {report.longrepr}"

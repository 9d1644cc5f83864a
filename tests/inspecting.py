"""Run ``gradsync inspect`` in this process."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from gradsync import UserError
from gradsync.inspect_model import main


def shown(*arguments: object) -> str:
    """What it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main([str(argument) for argument in arguments])
    return output.getvalue()


def records(*arguments: object) -> list[dict[str, Any]]:
    """``--json``."""
    return json.loads(shown("--json", *arguments))


def refusal(*arguments: object) -> str:
    """The one line that it ends with."""
    with pytest.raises(UserError) as raised:
        shown(*arguments)
    text = str(raised.value)
    assert "\n" not in text
    return text


def write_llama(folder: Path, **sizes: int) -> Path:
    """A ``config.json`` as Hugging Face publishes one; by default that of LLaMA-2-7B."""
    defaults = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, **defaults, **sizes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder

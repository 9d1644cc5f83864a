"""``--model.compile``: what torch has here, and a module that looks as ever to strategies and checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch

from gradsync.errors import UserError
from gradsync.modules import ImageClassifier
from gradsync.modules.compiling import check_backend


def built(backend: bool | str) -> ImageClassifier:
    torch.manual_seed(0)
    module = ImageClassifier("squeezenet1_1", num_classes=3, compile=backend)
    module.configure_model()
    return module.eval()


def test_names() -> None:
    assert check_backend(False) is None
    assert check_backend("aot_eager") == "aot_eager"
    with pytest.raises(UserError, match=r"--model\.compile: torch \S+ has no backend 'aot_eagre'; nearest: aot_eager"):
        check_backend("aot_eagre")


def test_inductor_without_a_compiler_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--model\.compile inductor needs a C\+\+ compiler such as g\+\+"):
        check_backend(True)


def test_parameters_keep_their_names_and_results_their_values() -> None:
    compiled, plain = built("aot_eager"), built(False)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(2, 3, 64, 64)
    torch._dynamo.utils.counters.clear()
    expected = plain(images)
    assert not torch._dynamo.utils.counters["frames"]
    torch.testing.assert_close(compiled(images), expected)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # it was compiled indeed


def test_a_copy_can_be_made_as_averaging_weights_does() -> None:
    compiled = built("aot_eager")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(copy.deepcopy(compiled)(images), compiled(images))

"""Published files: where they are looked for, how they are read, and what is timed."""

import pytest
import torch
from safetensors.torch import save_file

from reward_funcs import _throughput
from reward_funcs._weights import WeightFile, check_keys, read_tensors

HUB = WeightFile("the thing", "thing.pt", "THING", repository="them/thing")
URL = WeightFile("the thing", "thing.pt", "THING", url="https://example.org/thing.pt")


def test_a_file_a_folder_or_the_hub(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *where: asked.append(where) or "/cache/thing.pt")
    (tmp_path / "thing.pt").touch()
    (tmp_path / "other.pt").touch()
    assert HUB.find(str(tmp_path)) == tmp_path / "thing.pt"
    assert HUB.find(str(tmp_path / "other.pt")) == tmp_path / "other.pt"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert HUB.find("~/other.pt") == tmp_path / "other.pt"
    assert not asked
    assert str(HUB.find("us/thing")) == "/cache/thing.pt"
    assert asked == [("us/thing", "thing.pt")]


def test_a_file_of_no_hub_is_not_asked_for_there(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *where: pytest.fail(f"asked for {where}"))
    with pytest.raises(
        FileNotFoundError, match=r"'us/thing' is neither a file, nor a folder with thing\.pt: run `curl"
    ):
        URL.find("us/thing")


def test_tensors_are_read_from_either_format_and_no_code_runs(tmp_path):
    weight = {"weight": torch.arange(3.0)}
    torch.save(weight, tmp_path / "bare.pt")
    torch.save({"state_dict": weight}, tmp_path / "inside.pt")
    save_file(weight, tmp_path / "a.safetensors")
    for name in ("bare.pt", "inside.pt", "a.safetensors"):
        assert torch.equal(read_tensors(tmp_path / name)["weight"], weight["weight"])
    torch.save({"weight": Scripted()}, tmp_path / "scripted.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        read_tensors(tmp_path / "scripted.pt")


class Scripted:
    """Pickles as a call, as a malicious checkpoint does."""

    def __reduce__(self):
        return (exec, ("raise SystemExit",))


def test_an_error_names_a_few_keys_and_counts_the_rest():
    check_keys("it", {"a"}, {"a"})
    with pytest.raises(ValueError, match="it: missing keys 0, 1, 2, 3, 4 and 2 more; unexpected keys none"):
        check_keys("it", set(), set("6543210"))
    with pytest.raises(ValueError, match="missing keys none; unexpected keys b"):
        check_keys("it", {"a", "b"}, {"a"})


def test_the_timing_counts_images_not_batches(monkeypatch, capsys):
    # The clock moves a second at each look: start, after batches 1 and 2, end. Limit 2 s: two batches of 4, in 3 s.
    ticks = iter(range(100))
    monkeypatch.setattr(_throughput.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(_throughput.time, "process_time", iter([10.0, 12.0]).__next__)
    seen = []
    module = torch.nn.Linear(1999, 1000)
    subject = _throughput.Subject("a model", [module], lambda images, texts: seen.append((len(images), len(texts))))
    monkeypatch.setitem(_throughput.SUBJECTS, "mine", lambda device: subject)
    _throughput.main(["mine", "--batch", "4", "--seconds", "2", "--device", "cpu"])
    assert seen == [(1, 1), (4, 4), (4, 4)]
    # 8 images in 3 s; 2 CPU seconds for 8 images; 1999 * 1000 + 1000 parameters
    assert capsys.readouterr().out.startswith("| `mine` | a model | 2 M | 4 | 2.7 | 0.25 | ")

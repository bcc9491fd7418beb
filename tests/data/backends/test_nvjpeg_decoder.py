"""torchvision's decoder on a GPU: whether it works, and which pictures it refuses."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fastmoco.data.backends.nvjpeg import decoder
from tests.support.data.refusing import Refusing, bytes_of, encoded

CPU = torch.device("cpu")
decode_all = decoder.decode_all


def test_a_good_list_is_decoded_once_and_bad_ones_are_found_by_halves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded(32)
    for bad, most in (([], 1), ([0], 12), ([13, 31], 22)):
        fake = Refusing([bytes_of(data[number]) for number in bad])
        monkeypatch.setattr(decoder, "decode_all", fake)
        found = decoder.decode_or_refuse(data, CPU)
        assert [number for number, one in enumerate(found) if one is None] == bad
        assert fake.calls <= most
        for one, picture in zip(data, found, strict=True):
            assert picture is None or torch.equal(picture, decode_all([one], CPU)[0])


@pytest.mark.parametrize(
    "says",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "Failed to decode batch: 5",
        "Failed to synchronize CUDA stream: 700",
    ],
)
def test_a_fault_of_the_device_is_no_fault_of_a_picture(
    says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(8)
    fake = Refusing([bytes_of(data[3])], says)
    monkeypatch.setattr(decoder, "decode_all", fake)
    with pytest.raises(RuntimeError, match=says[:20]):
        decoder.decode_or_refuse(data, CPU)
    assert fake.calls == 1
    with (
        mock.patch.object(decoder, "decode_all", side_effect=torch.OutOfMemoryError("full")),
        pytest.raises(torch.OutOfMemoryError),
    ):
        decoder.decode_or_refuse(data, CPU)


def test_a_decoder_that_refuses_everything_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(4)
    monkeypatch.setattr(decoder, "decode_all", Refusing([bytes_of(one) for one in data]))
    with pytest.raises(RuntimeError, match="batch: 3"):
        decoder.decode_or_refuse(data, CPU)
    assert decoder.decode_or_refuse(data[:1], CPU) == [None]


def test_whether_a_device_decodes_is_found_by_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no NVIDIA GPU" in decoder.why_not(CPU)
    answers: dict[str, object] = {"": lambda image: image, "levels from": lambda image: image // 2}
    for number, (reason, change) in enumerate(answers.items()):
        monkeypatch.setattr(
            decoder,
            "decode_all",
            lambda data, device, change=change: [
                change(one) if device != CPU else one for one in decode_all(data, CPU)
            ],
        )
        found = decoder.why_not(torch.device("cuda", number))
        assert reason in found
        assert bool(reason) == bool(found)
    broken = mock.Mock(side_effect=RuntimeError("not compiled with nvJPEG\nsupport"))
    monkeypatch.setattr(decoder, "decode_all", broken)
    assert "(not compiled with nvJPEG support)" in decoder.why_not(torch.device("cuda", 2))
    monkeypatch.setattr(decoder, "_decode_jpeg", None)
    assert "no decoder" in decoder.why_not(torch.device("cuda", 3))


@pytest.mark.gpu
def test_nvjpeg_decodes_on_this_gpu_and_refuses_what_is_broken() -> None:
    device = torch.device("cuda", 0)
    assert decoder.why_not(device) == ""
    data = encoded(8)
    tables = bytes_of(data[5])
    broken = tables[: tables.index(b"\xff\xc4")] + tables[tables.index(b"\xff\xda") :]
    data[5] = torch.frombuffer(bytearray(broken), dtype=torch.uint8)
    torch.cuda.synchronize()
    found = decoder.decode_or_refuse(data, device)
    assert [number for number, one in enumerate(found) if one is None] == [5]

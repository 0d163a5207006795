"""Rows of names, against a dict."""

import hashlib

import numpy as np

from hf_delta import ids
from hf_delta.ids import KeyTable, digests


def test_against_a_dict_while_it_grows(monkeypatch):
    """Few rows to start with and digests that crowd a few slots: it must grow often and probe far."""
    monkeypatch.setattr(ids, "FIRST_ROWS", 4)
    table, rows = KeyTable(), {}
    generator = np.random.default_rng(0)
    for size in [0, 1, 3, 7, 1, 50, 200, 13, 1500, 1]:
        keys = np.unique(generator.integers(-200, 200, size) * 2 ** generator.integers(0, 40, size))
        expected = [rows.setdefault(key, len(rows)) for key in keys.tolist()]
        assert table.add(keys).tolist() == expected
        assert table.keys.tolist() == list(rows)
        asked = np.concatenate([generator.permutation(table.keys), keys + 1])
        assert table.find(asked).tolist() == [rows.get(key, -1) for key in asked.tolist()]
    assert len(table) == len(rows) > 1500


def test_digests_do_not_change():
    """They stand in checkpoints: BLAKE2b with 8 bytes of output, little endian."""
    expected = [
        int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
        for name in ("é", "17")
    ]
    assert digests(["é", 17], "ids").tolist() == expected
    assert len(digests(["\ud800"], "ids")) == 1
    assert len(set(digests([str(i) for i in range(50_000)], "ids").tolist())) == 50_000

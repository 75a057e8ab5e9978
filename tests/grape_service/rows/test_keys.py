import hashlib

import numpy as np
import pytest

from grape_service.rows.keys import candidate_id_of, partition_names, partition_of, prompt_id_of, row_keys
from grape_service.rows.ragged import offsets_from_lengths

pytestmark = pytest.mark.quick

PROMPT = [{"role": "user", "content": "2 + 2?"}]


def test_a_row_key_is_the_digest_of_ids_and_mask():
    ids = np.array([1, 2, 300000, 4, 5], dtype=np.int32)
    mask = np.array([0, 1, 2, 0, 1], dtype=np.uint8)
    keys = row_keys(ids, mask, offsets_from_lengths([3, 2])).to_pylist()
    first = bytes.fromhex("01000000 02000000 e0930400") + b"|" + b"\0\1\1"
    second = bytes.fromhex("04000000 05000000") + b"|" + b"\0\1"
    assert keys == [hashlib.sha256(text).digest()[:16] for text in (first, second)]


def test_a_turn_end_and_another_token_with_loss_are_the_same_to_a_row_key():
    ids, offsets = np.array([1, 2], dtype=np.int32), offsets_from_lengths([2])
    keys = [row_keys(ids, np.array([0, value]), offsets)[0].as_py() for value in (1, 2, 0)]
    assert keys[0] == keys[1] != keys[2]
    assert row_keys(ids, np.array([False, True]), offsets)[0].as_py() == keys[0]


def test_ids_are_digests_of_content_whatever_the_order_of_keys():
    assert prompt_id_of(PROMPT) == prompt_id_of([{"content": "2 + 2?", "role": "user"}])
    assert prompt_id_of(PROMPT) != prompt_id_of(PROMPT, [{"name": "calculator"}])
    digest = prompt_id_of(PROMPT)
    assert candidate_id_of(digest, "a", "4") == candidate_id_of(digest, "a", [{"role": "assistant", "content": "4"}])
    assert len({candidate_id_of(digest, source, "4") for source in ("a", "b", None)}) == 3
    assert candidate_id_of(digest, "a", "4") != candidate_id_of(digest, "a", "5")


def test_partitions_are_named_by_the_leading_bits_of_their_prompts():
    assert partition_names(1) == ["b"]
    assert partition_names(4) == ["b00", "b01", "b10", "b11"]
    for number in range(50):
        bits = f"{hashlib.sha256(f'p{number}'.encode()).digest()[0]:08b}"
        assert partition_of(f"p{number}", 1) == "b"
        assert partition_of(f"p{number}", 8) == "b" + bits[:3]

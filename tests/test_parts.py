"""Who holds which examples: as a partition says it, in two arrays."""

import pickle

import numpy as np
import pytest

from lightning_fedsparse.parts import Parts


def indices(*values):
    return np.array(values, np.int64)


def test_three_clients_one_of_them_without_examples():
    parts = Parts({"b": indices(4, 7), "none": indices(), "a": indices(0)})
    assert list(parts) == ["b", "none", "a"]
    assert len(parts) == 3
    assert {client: part.tolist() for client, part in parts.items()} == {"b": [4, 7], "none": [], "a": [0]}
    assert parts.sizes == {"b": 2, "none": 0, "a": 1}
    assert "c" not in parts
    with pytest.raises(KeyError, match="c"):
        parts["c"]


def test_no_clients():
    assert dict(Parts({})) == Parts({}).sizes == {}


def test_many_clients_travel_as_their_numbers():
    count = 10_000
    given = {str(index): indices(index, index + count) for index in range(count)}
    sent = pickle.dumps(Parts(given))
    numbers = 8 * (2 * count + count + 1)
    assert len(sent) < numbers + 20 * count < len(pickle.dumps(given))  # an id and its position take less than 20 bytes
    assert {client: part.tolist() for client, part in pickle.loads(sent).items()} == {
        client: part.tolist() for client, part in given.items()
    }

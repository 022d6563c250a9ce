import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fedsparse.partition import (
    DirichletPartition,
    IidPartition,
    NaturalPartition,
    PathologicalPartition,
    dirichlet_partition,
    iid_partition,
    natural_partition,
    pathological_partition,
)

CIFAR10 = np.repeat(np.arange(10), 5000)
CIFAR100 = np.repeat(np.arange(100), 500)
FASHION_MNIST = np.repeat(np.arange(10), 6000)


def counts(labels, part):
    return np.bincount(labels[part], minlength=labels.max() + 1).tolist()


def assert_each_once(parts, size):
    assert sorted(np.concatenate(list(parts)).tolist()) == list(range(size))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


# known answers: counts per client and class


def test_iid_deals_every_class_evenly():
    for part in iid_partition(CIFAR10, 50):
        assert counts(CIFAR10, part) == [100] * 10
    for part in iid_partition(FASHION_MNIST, 50):
        assert counts(FASHION_MNIST, part) == [120] * 10
    for part in iid_partition(CIFAR100, 50):
        assert counts(CIFAR100, part) == [10] * 100


def test_iid_of_four_examples():
    parts = [part.tolist() for part in iid_partition([0, 0, 1, 1], 2, seed=3)]
    assert sorted(parts) in ([[0, 2], [1, 3]], [[0, 3], [1, 2]])


@pytest.mark.parametrize(("labels", "share"), [(CIFAR10, 499), (FASHION_MNIST, 599)])
def test_pathological_gives_two_classes_each(labels, share):
    for client, part in enumerate(pathological_partition(labels, 50)):
        size = share + 10 if client % 10 == 9 else share
        expected = [0] * 10
        expected[2 * (client // 10)] = expected[2 * (client // 10) + 1] = size
        assert counts(labels, part) == expected


def test_pathological_of_test_sets_and_of_a_hundred_classes():
    sizes = [part.size for part in pathological_partition(np.repeat(np.arange(10), 1000), 50)]
    assert sizes == ([198] * 9 + [218]) * 5
    for client, part in enumerate(pathological_partition(CIFAR100, 50)):
        assert part.tolist() == list(range(1000 * client, 1000 * client + 1000))


def test_natural_partition_keeps_the_order_of_keys():
    parts = natural_partition([10, 9, 10, 2])
    assert {client: part.tolist() for client, part in parts.items()} == {"2": [3], "9": [1], "10": [0, 2]}
    assert list(parts) == ["2", "9", "10"]


# properties


@given(
    labels=st.lists(st.integers(-2, 4), min_size=1, max_size=60),
    num_clients=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_iid_assigns_each_example_once_with_even_sizes(labels, num_clients, seed):
    num_clients = min(num_clients, len(labels))
    parts = iid_partition(labels, num_clients, seed=seed)
    assert len(parts) == num_clients
    assert_each_once(parts, len(labels))
    for chosen in ([range(len(labels))], [np.flatnonzero(np.array(labels) == label) for label in set(labels)]):
        for members in chosen:
            held = [np.isin(part, members).sum() for part in parts]
            assert max(held) - min(held) <= 1


@given(
    labels=st.lists(st.integers(0, 3), min_size=12, max_size=60),
    num_clients=st.integers(1, 4),
    alpha=st.floats(0.2, 50),
    seed=st.integers(0, 9),
)
def test_dirichlet_assigns_each_example_once(labels, num_clients, alpha, seed):
    parts = dirichlet_partition(labels, num_clients, alpha=alpha, seed=seed)
    assert len(parts) == num_clients
    assert_each_once(parts, len(labels))
    assert min(part.size for part in parts) >= 1


@given(
    num_classes=st.integers(1, 6),
    clients_per_class=st.integers(1, 4),
    classes_per_client=st.integers(1, 3),
    class_size=st.integers(4, 15),
)
def test_pathological_assigns_each_example_once(num_classes, clients_per_class, classes_per_client, class_size):
    num_classes *= classes_per_client  # then the slots of all clients are a multiple of the classes
    labels = np.repeat(np.arange(num_classes), class_size)
    num_clients = num_classes * clients_per_class // classes_per_client
    parts = pathological_partition(labels, num_clients, classes_per_client=classes_per_client)
    assert_each_once(parts, len(labels))
    assert max(len(set(labels[part])) for part in parts) <= classes_per_client


@given(keys=st.lists(st.text(alphabet="abc", max_size=2), min_size=1, max_size=30))
def test_natural_assigns_each_example_to_its_key(keys):
    parts = natural_partition(keys)
    assert_each_once(parts.values(), len(keys))
    for client, part in parts.items():
        assert {keys[index] for index in part} == {client}


def test_dirichlet_is_less_even_for_small_alpha():
    def spread(alpha):
        parts = dirichlet_partition(CIFAR10, 20, alpha=alpha)
        return np.std([counts(CIFAR10, part) for part in parts])

    assert spread(0.1) > 2 * spread(1.0) > 8 * spread(100.0)


def test_dirichlet_redraws_until_everyone_has_enough():
    few = min(part.size for part in dirichlet_partition(CIFAR10, 50, alpha=0.3))
    enough = min(part.size for part in dirichlet_partition(CIFAR10, 50, alpha=0.3, min_examples=few + 50))
    assert enough >= few + 50


@pytest.mark.parametrize(
    "split",
    [
        lambda seed: iid_partition(CIFAR10, 7, seed=seed),
        lambda seed: dirichlet_partition(CIFAR10, 7, alpha=0.5, seed=seed),
        lambda seed: pathological_partition(CIFAR10, 10, seed=seed),
    ],
    ids=["iid", "dirichlet", "pathological"],
)
def test_seed_decides_and_the_global_generator_does_not(split):
    first = split(1)
    np.random.seed(123)
    before = np.random.get_state()[1].copy()
    again, other = split(1), split(2)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


# recipe entries


def test_ids_sort_as_numbers():
    parts = IidPartition(50).split(CIFAR10, CIFAR10.size, 0)
    assert list(parts) == sorted(parts)
    assert {min(parts), max(parts)} == {"00", "49"}
    assert list(IidPartition(10).split(None, 10, 0)) == list("0123456789")


def test_entries_split_as_the_functions_do():
    pairs = [
        (IidPartition(7), iid_partition(CIFAR10, 7, seed=4)),
        (DirichletPartition(7, alpha=0.5, min_examples=9), dirichlet_partition(CIFAR10, 7, alpha=0.5, seed=4)),
        (
            PathologicalPartition(10, classes_per_client=3),
            pathological_partition(CIFAR10, 10, classes_per_client=3, seed=4),
        ),
        (NaturalPartition(), list(natural_partition(CIFAR10).values())),
    ]
    for entry, expected in pairs:
        for part, other in zip(entry.split(CIFAR10, CIFAR10.size, 4).values(), expected, strict=True):
            np.testing.assert_array_equal(part, other)


def test_iid_entry_splits_without_labels():
    parts = IidPartition(3).split(None, 10, 0)
    assert sorted(part.size for part in parts.values()) == [3, 3, 4]
    assert_each_once(parts.values(), 10)


def test_natural_entry_leaves_small_clients_out():
    parts = NaturalPartition(min_examples=2).split(np.array(["a", "b", "b", "c", "c"]), 5, 0)
    assert {client: part.tolist() for client, part in parts.items()} == {"b": [1, 2], "c": [3, 4]}


# errors


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (lambda: iid_partition([0, 1], 3), r"num_clients must be in 1\.\.2, the number of examples, got 3"),
        (lambda: iid_partition([0, 1], 0), r"num_clients must be in 1\.\.2, the number of examples, got 0"),
        (lambda: iid_partition([[0], [1]], 1), r"labels must be a row of integers, got shape \(2, 1\)"),
        (lambda: iid_partition([0.5, 1.0], 1), r"labels must be a row of integers, got shape \(2,\), float64"),
        (lambda: iid_partition([], 1), r"num_clients must be in 1\.\.0"),
        (lambda: dirichlet_partition([0, 1], 2, alpha=0), "alpha of a Dirichlet partition must be above 0"),
        (lambda: dirichlet_partition([0, 1], 2, alpha=float("nan")), "alpha of a Dirichlet partition .* got nan"),
        (lambda: dirichlet_partition([0, 1], 2, alpha=float("inf")), "alpha of a Dirichlet partition .* got inf"),
        (
            lambda: dirichlet_partition([0, 1, 0], 2, alpha=1, min_examples=2),
            r"min_examples must be at least 1 and at most 1 \(3 examples over 2 clients\), got 2",
        ),
        (lambda: dirichlet_partition([0, 1], 2, alpha=1, min_examples=0), "min_examples must be at least 1"),
        (
            lambda: dirichlet_partition(np.zeros(100, int), 50, alpha=0.01, min_examples=2),
            "no Dirichlet.0.01. draw out of 1000 gave each of 50 clients at least 2 of 100 examples",
        ),
        (
            lambda: pathological_partition(CIFAR10, 5, classes_per_client=11),
            r"classes_per_client must be in 1\.\.10, got 11",
        ),
        (lambda: pathological_partition(CIFAR10, 4), "4 clients with 2 classes each cannot hold 10 classes"),
        (lambda: pathological_partition(CIFAR10, 7), r"2 of 7 clients get no class: .* got 7 \* 2"),
        (
            lambda: pathological_partition([0, 1, 1, 1], 4, classes_per_client=1),
            "class 0 has 1 examples, too few for 2 clients",
        ),
        (lambda: natural_partition([]), "client keys must be a row of strings or integers"),
        (lambda: natural_partition([[1], [2]]), "client keys must be a row of strings or integers"),
        (lambda: natural_partition([0.5]), "client keys must be a row of strings or integers"),
        (
            lambda: DirichletPartition(2, alpha=1.0).split(None, 4, 0),
            "DirichletPartition needs integer class labels, and the data set has none",
        ),
        (
            lambda: PathologicalPartition(2).split(None, 4, 0),
            "PathologicalPartition needs integer class labels, and the data set has none",
        ),
        (
            lambda: NaturalPartition().split(None, 4, 0),
            "NaturalPartition needs client_keys, and the data set has none",
        ),
        (
            lambda: NaturalPartition(min_examples=3).split(np.array(["a", "b", "b"]), 3, 0),
            "no client has 3 examples: the largest has 2",
        ),
    ],
)
def test_bad_input(split, message):
    with pytest.raises(ValueError, match=message):
        split()

"""Options as values: compared, hashed, copied and written out, also those of a converted pair."""

import copy
import dataclasses
import pickle

import pytest

from quantspec import QuantSpecConfig


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config)), dataclasses.replace],
    ids=["copy", "deepcopy", "pickle", "replace"],
)
def test_a_copy_is_equal(qs, copied):
    for config in (qs.config, QuantSpecConfig(weight_group_size=64)):
        assert copied(config) == config
        assert hash(copied(config)) == hash(config)
        assert copied(config) != dataclasses.replace(config, kv_group_size=256)


def test_a_config_as_a_dict_makes_the_same_config(qs):
    # Some linear of the tiny model is narrower than the group size asked for.
    assert qs.config.adapted_group_sizes
    options = dataclasses.asdict(qs.config)
    assert options["adapted_group_sizes"] == qs.config.adapted_group_sizes
    assert QuantSpecConfig(**options) == qs.config


def test_a_config_keeps_its_own_group_sizes():
    sizes = {"linear": 32}
    config = QuantSpecConfig(adapted_group_sizes=sizes)
    sizes["linear"] = 64
    assert config.adapted_group_sizes == {"linear": 32}

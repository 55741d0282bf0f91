"""Pairs of models with the same weights: transformers' and, through our loader, ours."""

import hf_reference
import pytest


@pytest.fixture(scope="session")
def aperiodic(tmp_path_factory: pytest.TempPathFactory) -> hf_reference.Pair:
    folder = tmp_path_factory.mktemp("aperiodic")
    return hf_reference.make_pair(hf_reference.APERIODIC, 1, folder)


@pytest.fixture(scope="session")
def periodic(tmp_path_factory: pytest.TempPathFactory) -> hf_reference.Pair:
    folder = tmp_path_factory.mktemp("periodic")
    return hf_reference.make_pair(hf_reference.PERIODIC, 2, folder)

"""The bytes of storages, from birth to end."""

import torch

from leanmim.costs.storages import Held, Storages


def test_a_storage_lives_as_long_as_its_last_tensor() -> None:
    storages = Storages()
    with storages:
        one = torch.zeros(10)
        view = one[:5].view(5, 1)
        assert storages.now["transient"] == 40
        del one
        assert storages.now["transient"] == 40
        del view
        two = torch.zeros(5)
    assert (storages.now["all"], storages.peak["all"]) == (20, 40)
    del two
    assert storages.now["all"] == 0


def test_sizes_are_rounded_up_as_the_allocator_does() -> None:
    storages = Storages(round_to=512)
    with storages:
        kept = torch.zeros(129)
    assert storages.now["all"] == 1024
    del kept


def test_a_kind_can_change() -> None:
    storages = Storages()
    with storages:
        tensor = torch.zeros(4)
        storages.follow(tensor, "gradients")
    assert (storages.now["transient"], storages.now["gradients"], storages.now["all"]) == (0, 16, 16)
    assert storages.peak["all"] == 16


def test_what_autograd_holds_twice_is_saved_until_it_holds_it_no_more() -> None:
    storages = Storages()
    with storages:
        tensor = torch.zeros(4)
        first, second = Held(tensor, storages), Held(tensor, storages)
        assert storages.now["saved"] == 16
        del first
        assert storages.now["saved"] == 16
        del second
        assert (storages.now["saved"], storages.now["transient"]) == (0, 16)


def test_weights_that_autograd_holds_stay_weights() -> None:
    storages = Storages()
    weight = torch.zeros(4)
    storages.follow(weight, "weights")
    held = Held(weight, storages)
    assert (storages.now["weights"], storages.now["saved"]) == (16, 0)
    del held
    assert storages.now["weights"] == 16


def test_what_waits_on_the_host_is_not_the_devices() -> None:
    storages = Storages()
    weight = torch.zeros(4)
    storages.follow(weight, "host")
    assert (storages.now["host"], storages.now["all"]) == (16, 0)

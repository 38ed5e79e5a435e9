"""The section ``communication`` of the options: what is refused, and what is said of it."""

from __future__ import annotations

import re

import pytest

from memplan.ir.communication import Thresholds
from memplan.ir.communication_options import CommunicationOptions
from memplan.ir.errors import OptionError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("two_shot", "takes a dictionary of options, not 'two_shot'"),
        ({"all_reduces": "auto"}, "unknown option 'all_reduces' in 'communication' (did you mean 'all_reduce'?)"),
        ({"all_reduce": "ring"}, "one of auto, library, one_shot, two_shot, not 'ring'"),
        ({"all_to_all": "auto"}, "one of library, symmetric, not 'auto'"),
        ({"one_shot_bytes": -1}, "takes a number of bytes, not -1"),
        ({"overlap_bytes": None}, "takes a number of bytes, not None"),
        ({"timeout": 0}, "takes seconds or None, not 0"),
        ({"registered": True}, "option 'registered' in 'communication' is one of off, auto, on, not True"),
        ({"multicast": "yes"}, "option 'multicast' in 'communication' takes True or False, not 'yes'"),
        ({"agree": 1}, "option 'agree' in 'communication' takes True or False, not 1"),
    ],
)
def test_what_is_no_option_is_refused(given: object, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        CommunicationOptions.checked(given)


def test_what_may_lie_in_communication_memory() -> None:
    library = dict.fromkeys(("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all"), "library")
    assert CommunicationOptions().asks_symmetric
    assert not CommunicationOptions().asks_registered
    assert not CommunicationOptions.checked(library).asks_symmetric
    assert CommunicationOptions.checked({**library, "registered": "on"}).asks_registered


def test_bytes_given_by_the_user_come_before_those_of_the_machine() -> None:
    options = CommunicationOptions.checked({"one_shot_bytes": 10, "symmetric_bytes": 20})
    machine = Thresholds(1000, 2000, all_gather_least=500, all_gather_bytes=1000)
    assert [options.algorithm("all_reduce", machine, n) for n in (10, 11, 2001)] == ["one_shot", "two_shot", "library"]
    assert [options.algorithm("all_gather", machine, n) for n in (20, 600)] == ["symmetric", "library"]
    assert CommunicationOptions().algorithm("all_gather", machine, 600) == "symmetric"

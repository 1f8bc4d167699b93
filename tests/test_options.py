"""What is being typed on a magic's line."""

import pytest

from flexmagic.magics.cluster import ACTIONS, ClusterMagics
from flexmagic.magics.hook import HookMagics
from flexmagic.magics.options import arguments, options, typing
from flexmagic.magics.run import RunMagics
from flexmagic.magics.weights import WeightsMagics
from flexmagic.magics.workshop import WorkshopMagics

HOOK, RUN = options(HookMagics.flexhook), options(RunMagics.flexrun)
CLUSTER, WEIGHTS = options(ClusterMagics.flexcluster), options(WeightsMagics.flexweights)


@pytest.mark.parametrize(
    ("known", "rest", "typed", "kind"),
    [
        (HOOK, " ", "", "site"),
        (HOOK, " model.la", "model.la", "site"),
        (HOOK, " model.norm,model.la", "model.la", "site"),
        (HOOK, " model.layers.{2..5}.m", "model.layers.{2..5}.m", "site"),
        (HOOK, ' "model.la', "model.la", "site"),
        (HOOK, " --name damp model.la", "model.la", "site"),
        (HOOK, " model.norm --group ", "", "group"),
        (HOOK, " model.norm --group=A", "A", "group"),
        (HOOK, " --disable a b", "b", "hook group"),
        (HOOK, " --undo ", "", "hook"),
        (RUN, ' "a prompt, and more" --capture model.norm mod', "mod", "site"),
        (RUN, ' "a prompt" --only da', "da", "hook group"),
        (RUN, ' "a prompt', "a prompt", ""),
        (RUN, " --seed 1", "1", ""),
        (RUN, ' "a prompt" --backward ga', "ga", "loss"),
        (WEIGHTS, " model.norm.w", "model.norm.w", "parameter"),
        (CLUSTER, " attach fle", "fle", "cluster"),
    ],
)
def test_what_is_typed_and_of_what_kind_it_is(known, rest, typed, kind):
    now = typing(known, rest)
    assert (now.typed, now.option.kind) == (typed, kind)


@pytest.mark.parametrize("rest", [" --", " model.norm --na", ' "text" --capture model.norm --o'])
def test_an_option_is_typed_where_a_dash_begins_a_word(rest):
    assert typing(HOOK, rest).option is None


def test_actions_are_words():
    assert typing(CLUSTER, " st").option.words == ACTIONS
    known = options(WorkshopMagics.flexworkshop)
    assert {"send", "take"} <= set(typing(known, " s").option.words)
    assert "attach" not in typing(known, " s").option.words


def test_the_words_that_belong_to_no_option():
    assert arguments(HOOK, " --name damp model.norm --group A 'model.layers.*'") == [
        "model.norm",
        "model.layers.*",
    ]

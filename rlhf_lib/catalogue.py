"""Questions about what exists: the stages of a profile, what each needs, which policies there are.

Stages are run, policies compared, tables and figures labelled by what stands in `records`, and in
the records of the user's own that the setting `methods` names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from rlhf_lib.profiles import Overrides, load_profile, paths
from rlhf_lib.records import (
    CATALOGUE,
    DPO,
    GREY,
    LABELS,
    LIBRARY,
    MEMBERS,
    ONLINE_DPO,
    ROLES,
    Record,
    asks_ensemble,
)
from rlhf_lib.settings import Profile, SettingsError, unknown
from rlhf_lib.user_code import resolve


def load(profile: str, overrides: Overrides = ()) -> Profile:
    """`profiles.load_profile`, and the records that its setting `methods` names are entered."""
    found = load_profile(profile, overrides)
    extend(found)
    return found


def extend(profile: Profile) -> None:
    """Enter the records that the setting `methods` names: `package.module:RECORD`, by commas.

    Those of an earlier profile leave. Raises SettingsError for a record that cannot be run.
    """
    for name in [name for name in CATALOGUE if name not in LIBRARY]:
        del CATALOGUE[name]
    CATALOGUE["dpo"] = ONLINE_DPO if profile.dpo.online else DPO
    for name in filter(None, (part.strip() for part in profile.methods.split(","))):
        record = resolve(name)
        if not isinstance(record, Record):
            raise SettingsError(f"methods={name}: it is no rlhf_lib.catalogue.Record")
        if record.name in CATALOGUE:
            raise SettingsError(f"methods={name}: there is a record {record.name!r} already")
        CATALOGUE[record.name] = record
    for record in [CATALOGUE[name] for name in CATALOGUE if name not in LIBRARY]:
        _check(record, profile)
    stages(profile)  # raises for stages that need each other


def _check(record: Record, profile: Profile) -> None:
    """Raises SettingsError for a field of a record of the user's that could mean nothing."""
    from matplotlib.colors import is_color_like  # slow to import, and seldom asked for

    this = f"record {record.name!r}"
    sections = [field.name for field in fields(Profile) if is_dataclass(field.default_factory)]
    words = {
        "role": ([record.role], ("", *ROLES)),
        "pairs": ([record.pairs], ("train", "judge", *LABELS)),
        "needs": (record.needs, ("policies", *CATALOGUE)),
        "sections": (record.sections, sections),
        "variant_of": ([record.variant_of], ("", *CATALOGUE)),
        "tuned": (record.tuned, paths()),
        "notebook": ([record.notebook], {CATALOGUE[name].notebook for name in LIBRARY}),
    }
    for field, (given, known) in words.items():
        if not isinstance(given, (list, tuple)):
            raise SettingsError(f"{this}: {field} is {given!r}, not a tuple of names")
        for word in given:
            if word not in known:
                raise SettingsError(f"{this}: {unknown(field, word, known)}")
    if not re.fullmatch(r"[A-Za-z]\w*", record.name):
        raise SettingsError(f"{this}: a name has letters, digits and _ alone")
    if record.runs.count(":") != bool(record.runs):
        raise SettingsError(f"{this}: runs={record.runs!r} is no module:function")
    if "_minus_" in record.name or "," in record.label:
        raise SettingsError(
            f"{this}: names may not have _minus_, nor labels ({record.label!r}) a "
            "comma: the report makes both of several names"
        )
    if not is_color_like(record.color):
        raise SettingsError(f"{this}: color={record.color!r} is no color")
    for field in ("changes", "exists"):
        if not callable(getattr(record, field)):
            raise SettingsError(f"{this}: {field} is no function")
    try:
        config = record.config(profile)
        seeds = [seed for seed in range(profile.seeds) if record.exists(profile, seed)]
    except Exception as error:  # of the user's functions, whatever they do
        raise SettingsError(f"{this}: {type(error).__name__}: {error}") from error
    candidate = record.role in ("method", "baseline")  # prices and comparisons are over all seeds
    if seeds != [*range(len(seeds))] or (candidate and len(seeds) not in (0, profile.seeds)):
        rule = "what is compared has to be in all" if candidate else "these have to be the first"
        raise SettingsError(f"{this}: it exists in seeds {seeds} of {profile.seeds}; {rule}")
    known = [] if config is None else [field.name for field in fields(config)]
    for word in filter(None, (record.coefficient, *record.unread)):
        if word not in known and "." not in word:
            raise SettingsError(f"{this}: {unknown('setting', word, known or [''])}")


# ------------------------------------------------------------------------------------ questions


def record(name: str) -> Record:
    """Raises SettingsError, with the nearest names, for one that does not exist."""
    if name not in CATALOGUE:
        raise unknown("name", name, CATALOGUE)
    return CATALOGUE[name]


def label(name: str) -> str:
    """The name that readers see; its own for what no record names."""
    return CATALOGUE[name].label if name in CATALOGUE else name


def color(name: str) -> str:
    return CATALOGUE[name].color if name in CATALOGUE else GREY


def stages(profile: Profile, seed: int = 0) -> list[Record]:
    """The stages of one seed in the order of their records, but each after what it needs.

    Raises SettingsError for stages that need each other.
    """
    present = {r.name: r for r in CATALOGUE.values() if r.runs and r.exists(profile, seed)}
    placed: dict[str, Record] = {}

    def place(stage: Record, above: tuple[str, ...] = ()) -> None:
        if stage.name in above:
            circle = " needs ".join((*above, stage.name))
            raise SettingsError(f"these stages can never be run: {circle}")
        for need in _asked(stage, profile):
            if need in present and need not in placed:  # a record that was added later
                place(present[need], (*above, stage.name))
        placed.setdefault(stage.name, stage)

    for stage in present.values():
        place(stage)
    return list(placed.values())


def needs(profile: Profile, name: str, seed: int = 0) -> list[str]:
    """The stages of the same seed that `name` reads.

    What a study runs in its first seed alone may be asked for in any: it reads what it would there,
    and so does a record of the user's own.
    Who may stop early (`patience`) asks the judge, where there is one; whose reward is that of an
    ensemble, the rest of it.
    """
    present = {r.name for r in stages(profile, seed)}
    if name not in present or name not in LIBRARY:
        present |= {r.name for r in stages(profile)}
    return [need for need in _asked(CATALOGUE[name], profile) if need in present]


def _asked(stage: Record, profile: Profile) -> Iterator[str]:
    """What a stage reads, whether it exists or not."""
    yield from _expanded(stage)
    config = stage.config(profile)
    if getattr(config, "patience", 0):
        yield "judge"
    if asks_ensemble(config) and stage.pairs not in LABELS:  # members learnt from the usual ones
        yield from MEMBERS


def _expanded(stage: Record) -> Iterator[str]:
    """`policies` stands for every trained policy that is evaluated."""
    for need in stage.needs:
        yield from trained() if need == "policies" else (need,)


def notebooks() -> dict[str, list[str]]:
    """What each notebook trains, in the order of the chapters."""
    found: dict[str, list[str]] = {}
    for stage in CATALOGUE.values():
        if stage.notebook:
            found.setdefault(stage.notebook, []).append(stage.name)
    return dict(sorted(found.items()))


def policies(*roles: str) -> list[str]:
    """Names of the policies of these roles (default: all but the null), in the order of tables."""
    wanted = roles or tuple(role for role in ROLES if role != "null")
    known = CATALOGUE.values()
    return [r.name for role in ROLES if role in wanted for r in known if r.role == role]


def trained() -> list[str]:
    """The policies that stages train and evaluation asks, in the order of the stages."""
    return [r.name for r in CATALOGUE.values() if r.role and r.runs]


def methods() -> list[str]:
    """What is compared."""
    return policies("method")


def candidates() -> list[str]:
    """The methods, and the baseline that they have to beat."""
    return [*methods(), baseline()]


def baseline() -> str:
    return policies("baseline")[0]


def tuned() -> list[str]:
    """Those whose settings `tune` looks for."""
    return [r.name for r in CATALOGUE.values() if r.tuned]


def coefficients() -> dict[str, str]:
    """Each stage with a coefficient that holds it near SFT, and the setting's name."""
    return {r.name: r.coefficient for r in CATALOGUE.values() if r.coefficient}

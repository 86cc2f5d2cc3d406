"""The record of a stage: what its `stage.json` holds, as one typed object. No torch."""

import hashlib
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from rlhf_pipeline.rundir.strict_json import is_number

WEIGHTS = "adapter_model.safetensors"
ROWS = "rows.jsonl"
GATE_CLOSED: Final = "done, gate closed"
_OWN = ("init", "reward")  # the roles that have a field of their own


class Record(BaseModel):
    """What is known of a stage: written when it begins, when it ends, and when it is judged again.

    Every field may be absent, as most are until the stage is done. A value of another type than the field's counts as
    absent, and of a mapping only the items that are wrong are left out: a damaged record is read as far as possible.
    Keys that are not known here are kept as they are.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str = ""
    kind: str = ""

    state: Literal["running", "done", "done, gate closed", "failed", "waiting"] | None = None
    """As it was written; what it means now, `rundir.state` says."""

    stopped: bool = False
    """Whether the stage ended because somebody stopped it."""

    error: str | None = None
    """What ended the stage, or which gate is closed, in one sentence."""

    fingerprint: str | None = None
    """The hash of `inputs`."""

    inputs: dict[str, Any] = {}
    """All that decides the stage's result, as flat keys."""

    judging: dict[str, Any] | None = None
    """What decides how its policy was judged; None where it was not."""

    init: str | None = None
    """The stage that it starts from, or `base`."""

    reward: str | None = None
    """The stage that scores its replies."""

    rewards: dict[str, str] = {}
    """Further stages that score its replies, by role: `reward.2`, and so on."""

    others: dict[str, str] = {}
    """Other stages that it needs, by role: `rows` and `rows.2` whose rows it reads, `judge`, `init.2`."""

    parent_weights: dict[str, str | None] = {}
    """Of each stage that it was built on, the SHA-256 of the weights it had then."""

    log: str | None = None
    """Its log, a path inside the run directory."""

    started_at: str | None = None
    """When it began, in ISO 8601; of a stage that was resumed, the first time."""

    resumed_from_step: int | None = None
    versions: dict[str, str] = {}
    """The versions of the libraries that made it."""

    command: str | None = None
    recipe_folder: str | None = None
    git: dict[str, Any] | None = None
    machine: dict[str, Any] = {}

    wall_s: float | None = Field(default=None, allow_inf_nan=False)
    """Seconds that it has worked in all; while it runs, those before it was resumed."""

    finished_at: str | None = None
    artifact: str | None = None
    """What it published, a path inside the run directory; None until it was trained to its end."""

    artifact_files: dict[str, Annotated[tuple[int, str], Field(strict=False)]] = {}
    """The size in bytes and the SHA-256 of each file of the artifact, by its path inside."""

    template_day: str | None = None
    """The day that the chat template gives for today, in ISO 8601; None where it asks for none."""

    metrics: dict[str, Annotated[int | float | None, AfterValidator(lambda it: it if is_number(it) else None)]] = {}
    """Final numbers under TRL's names; None where one is not finite."""

    peak_memory_bytes: int | None = None
    """The most that it held: by a GPU's allocator, else the resident set of its process."""

    forecast_memory_bytes: int | None = None
    """What the allocator was forecast to count; None where none counted, or there was no forecast."""

    gates: dict[str, dict[str, Any]] = {}
    """Of each gate its `bound`, the metric's `value`, and whether it `passed`."""

    gates_ignored: dict[str, str] = {}
    """The bounds of closed gates that `--ignore-gates` passed over."""

    trusted_versions: dict[str, str] = {}
    """The versions of the libraries that `--trust-versions` accepted in place of those that made it."""

    taken_from: str | None = None
    """Where it was taken from, as another run, or this one formerly, had made it: a path in the folder of all runs."""

    taken_at: str | None = None
    """When it was taken, in ISO 8601; `started_at` and `finished_at` say when it was made."""

    @property
    def weights(self) -> str | None:
        """The SHA-256 of what later stages build on: the weights, of an ensemble those of all members; or the rows.

        None where its artifact names neither.
        """
        if ROWS in self.artifact_files:
            return self.artifact_files[ROWS][1]
        digests = [sha256 for file, (_, sha256) in sorted(self.artifact_files.items()) if file.endswith(WEIGHTS)]
        if WEIGHTS not in self.artifact_files:
            return None
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def parents(self) -> dict[str, str]:
        """The stage, or `base`, that it had in each role."""
        named = {role: getattr(self, role) for role in _OWN}
        return {role: name for role, name in named.items() if name is not None} | self.rewards | self.others

    def data(self, key: str) -> list[str]:
        """What the sources of its rows under a key of its inputs were, each as `NAME@DIGEST` where that is known."""
        digests = {f"stage:{name}": weights for name, weights in self.parent_weights.items() if weights}
        sources = filter(None, str(self.inputs.get(key) or "").split(" + "))
        return [f"{source}@{digests[source]}" if source in digests else source for source in sources]

    @staticmethod
    def with_parents(parents: dict[str, str]) -> dict[str, Any]:
        """The fields that say which stage it had in each role."""
        fields: dict[str, Any] = {role: parents.get(role) for role in _OWN}
        for role, name in parents.items():
            if role not in _OWN:
                fields.setdefault("rewards" if role.startswith("reward.") else "others", {})[role] = name
        return fields

    @property
    def is_finished(self) -> bool:
        """Whether the stage was trained to its end."""
        return self.artifact is not None or self.state in ("done", GATE_CLOSED)

    @property
    def closed_gate(self) -> str | None:
        """What a stage that was trained to its end does not pass, in one line; None where its gates are open."""
        if self.state != GATE_CLOSED:
            return None
        return (self.error or "it does not pass its gates").removeprefix("a gate is closed: ")

    def as_json(self) -> dict[str, Any]:
        """What to write: every key that was ever given a value."""
        return self.model_dump(exclude_unset=True)

    def updated(self, **changes: Any) -> "Record":
        """The same record with other values of some fields."""
        return Record.model_validate(self.as_json() | changes)

    @model_validator(mode="before")
    @classmethod
    def _from_former_versions(cls, content: Any) -> Any:
        """Take over what former versions wrote in other words."""
        content = dict(content)
        if "built_on" in content:
            content["parent_weights"] = content.pop("built_on")
        if content.get("error") == "stopped" and "stopped" not in content:
            content |= {"error": None, "stopped": True}
        if content.get("state") == "failed" and content.get("artifact") is not None:
            content["state"] = GATE_CLOSED
        return content

    @field_validator("*", mode="wrap")
    @classmethod
    def _tolerate(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if isinstance(value, dict):
                wrong = {problem["loc"][0] for problem in error.errors() if problem["loc"]}
                return handler({key: item for key, item in value.items() if key not in wrong})
            return cls.model_fields[str(info.field_name)].get_default()

"""A JSON Schema of recipes, from which editors complete and check them.

Our own keys come from the schema in Python; those of `trainer` and `lora` from the libraries' source files, so nothing
here imports torch. The draft is 7, which editors know best. It describes a recipe as it is written: short forms,
`extends` and `${VAR}` included.
"""

import re
from typing import Any

from rlhf_pipeline import kinds
from rlhf_pipeline.kinds import NAMES
from rlhf_pipeline.recipe import library_keys
from rlhf_pipeline.recipe.launch_keys import KEY as LAUNCH
from rlhf_pipeline.recipe.launch_keys import SHARDING, options
from rlhf_pipeline.recipe.schema import BASE, Recipe, Stage

# Text in place of a number or another value: with a variable in it, or a number with underscores.
STANDS_FOR_VALUE = r"\$\{|^[-+]?\d[\d.]*_[\d_.eE+-]*$"
# What is beside the libraries' own defaults, or narrower than their types.
OWN_DEFAULTS = ("save_strategy", "save_steps", "save_total_limit")
NARROWER = {"init_lora_weights": "Literal[True, 'gaussian']"}
# What a key is that has no effect in a kind of stage, in a resolved recipe at least; editors need not offer it.
WITHOUT_EFFECT = {"type": "null", "doNotSuggest": True}


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe."""
    ours = Recipe.model_json_schema(ref_template="#/definitions/{model}")
    definitions = {name: _object(schema) for name, schema in ours.pop("$defs").items()}
    recipe = _object(ours)
    definitions["Data"]["type"] = ["object", "string", "array"]  # `data: FILE`, `data: [A, B]`
    definitions["Data"]["items"] = {"$ref": "#/definitions/MixedSource"}
    definitions["Source"]["type"] = definitions["MixedSource"]["type"] = ["object", "string"]
    definitions["MixedSource"]["required"] = ["path"]
    definitions["Lora"], definitions["Launch"] = _library("lora"), _launch()
    recipe["properties"]["lora"] |= {"$ref": "#/definitions/Lora"}
    recipe["properties"][LAUNCH] = _refers(recipe["properties"][LAUNCH], "Launch")
    trackers = recipe["properties"]["report_to"]
    one = trackers.pop("items")
    trackers["anyOf"] = [{"type": trackers.pop("type"), "items": one}, {"const": "none"}, *one["anyOf"]]
    definitions |= _stages(definitions.pop("Stage"))
    extends = {"type": "string", "minLength": 1, "description": "The recipe that this one builds on: a file, or the "
               "name of a shipped one. Keys set here replace those set there."}  # fmt: skip
    recipe["properties"] = {"name": recipe["properties"].pop("name"), "extends": extends, **recipe["properties"]}
    recipe["properties"]["stages"] |= {
        "properties": {kind: {"$ref": f"#/definitions/StageNamed{kind.title()}"} for kind in NAMES},
        "additionalProperties": {"$ref": "#/definitions/Stage"},
        "propertyNames": {"pattern": r"^\w[\w-]*$", "not": {"enum": [*Recipe.model_fields, BASE]}},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe for rlhf-pipeline",
        "$comment": "Keys of `trainer` and `lora` have the descriptions of TRL, Transformers and PEFT (Apache-2.0).",
        **recipe,
        # What must be there, unless another recipe has it.
        "if": {"not": {"required": ["extends"]}},
        "then": {
            "required": ["model", "stages"],
            "properties": {
                "model": {"required": ["path"]},
                "evaluate": {"required": ["data"], "anyOf": [{"required": ["judge"]}, {"required": ["ai_judge"]}]},
                "stages": {
                    "minProperties": 1,
                    "properties": {kind: {"type": "object", "required": ["data"]} for kind in NAMES},
                    "additionalProperties": {"type": "object", "required": ["kind", "data"]},
                },
            },
        },
        "definitions": definitions,
    }


def _stages(stage: dict[str, Any]) -> dict[str, Any]:
    """A definition for each kind of stage, and those that choose one by a stage's name and `kind`."""
    stage["type"] = ["object", "null"]  # `dpo: null` leaves out a stage of the recipe that is extended
    properties = stage["properties"]
    properties["lora"] |= {"$ref": "#/definitions/Lora"}
    properties[LAUNCH] = _refers(properties[LAUNCH], "Launch")
    chosen: dict[str, Any] = {"$ref": "#/definitions/StageOfSomeKind"}  # the recipe it extends gives its kind
    definitions = {"StageOfSomeKind": {**stage, "properties": dict(properties)}}
    for kind in reversed(NAMES):
        title = kind.title()
        takes = kinds.get(kind).takes
        own = dict(properties)
        own |= {key: WITHOUT_EFFECT for key in kinds.KEYS if key not in takes}
        own["kind"] = {"const": kind, "description": Stage.model_fields["kind"].description}
        if "trainer" in takes:
            described = properties["trainer"]["description"]
            own["trainer"] = {"$ref": f"#/definitions/{title}Trainer", "description": described}
            definitions[f"{title}Trainer"] = _library(kind)
        definitions[f"{title}Stage"] = {**stage, "properties": own}
        definitions[f"StageNamed{title}"] = {
            "if": {"required": ["kind"]},
            "then": {"$ref": "#/definitions/Stage"},
            "else": {"$ref": f"#/definitions/{title}Stage"},
        }
        is_this = {"properties": {"kind": {"const": kind}}, "required": ["kind"]}
        chosen = {"if": is_this, "then": {"$ref": f"#/definitions/{title}Stage"}, "else": chosen}
    definitions["Stage"] = chosen
    return definitions


def _object(schema: dict[str, Any]) -> dict[str, Any]:
    """One of pydantic's objects, tidied; what it requires may be in another recipe, see `extends`."""
    properties = {name: _tidy(value) for name, value in schema["properties"].items()}
    return {
        "description": " ".join(schema["description"].split()),
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _tidy(schema: dict[str, Any]) -> dict[str, Any]:
    """A value's schema in fewer words than pydantic's."""
    about = {key: schema[key] for key in ("description", "default") if schema.get(key) not in (None, "", [], {})}
    if "description" in about:
        about["description"] = " ".join(about["description"].split())
    type_ = {key: value for key, value in schema.items() if key not in ("title", "description", "default")}
    return about | _merged(type_.get("anyOf", [type_]))


def _merged(types: list[dict[str, Any]]) -> dict[str, Any]:
    """One schema for a value of any of several types; what is not text may also be written as `${VAR}`."""
    if {} in types:  # only the library can tell what it takes
        return {}
    if any("type" not in one for one in types):  # one of our own mappings
        return {"anyOf": types} if len(types) > 1 else types[0]
    choices = [word for one in types for word in one.get("enum", [one["const"]] if "const" in one else [])]
    others = sorted((one for one in types if not one.keys() & {"enum", "const"}), key=lambda one: str(one["type"]))
    merged = {key: value for one in others for key, value in one.items()}
    names = [one["type"] for one in others]
    for part in ("items", "additionalProperties"):
        if isinstance(merged.get(part), dict):
            merged[part] = _tidy(merged[part])
    if "pattern" in merged:
        merged["pattern"] += r"|\$\{"
    elif {"integer", "number", "boolean"} & set(names) and "string" not in names:
        names.append("string")
        merged["pattern"] = STANDS_FOR_VALUE
    if others:
        merged["type"] = names if len(names) > 1 else names[0]
    if not choices:
        return merged
    return {"anyOf": [{"enum": choices}, {"type": "string", "pattern": r"\$\{"}, *([merged] if merged else [])]}


def _refers(schema: dict[str, Any], definition: str) -> dict[str, Any]:
    """A key with the values of a definition."""
    return {"description": schema["description"], "$ref": f"#/definitions/{definition}"}


def _launch() -> dict[str, Any]:
    """`launch`: a mapping, or `auto`, or a file."""
    found = _library(LAUNCH)
    found["type"] = ["object", "string"]
    for section, title in SHARDING.items():
        found["properties"][section] = {
            "type": "object",
            "description": f"{title}'s keys, as `accelerate config` writes them.",
            "properties": {key: {} for key in options(section)},
        }
    return found


def _library(config: str) -> dict[str, Any]:
    """The keys of a library's config class that a recipe may set."""
    settable = set(library_keys.settable(config))
    keys = {name: key for name, key in library_keys.keys(config).items() if name in settable}
    return {
        "description": f"The keys of {library_keys.documented(config)}.",
        "type": "object",
        "properties": {name: _library_key(name, key) for name, key in keys.items()},
        "additionalProperties": False,
    }


def _library_key(name: str, key: library_keys.Key) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": first_sentences(key.help)} if key.help else {}
    if key.default not in (..., None) and name not in OWN_DEFAULTS:
        schema["default"] = key.default
    return _tidy(schema | library_keys.adapter(NARROWER.get(name, key.annotation)).json_schema())


def first_sentences(text: str, enough: int = 200) -> str:
    """The beginning of a text: whole sentences, until there are `enough` characters."""
    end = re.compile(r"[.!?](?=\s|$)")
    for match in end.finditer(text):
        if match.end() >= enough:
            return text[: match.end()]
    return text

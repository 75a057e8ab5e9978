"""croissant.json: a version's metadata in the form that dataset search and other tools read.

Croissant 1.1 (mlcommons.org/croissant): what files there are, with their sha256; what a row holds; with PROV, what the
version was derived from; and with the RAI vocabulary, how it was chosen, as far as the manifest says.
"""

from __future__ import annotations

from grape_service.json_types import JsonObject
from grape_service.release.manifest import POOL_FILES, Manifest, PolicyUse
from grape_service.storage.storage import json_bytes

CONFORMS_TO = ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"]
PARQUET = "application/x-parquet"
CONTEXT: JsonObject = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "isArray": "cr:isArray",
    "arrayShape": "cr:arrayShape",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "prov": "http://www.w3.org/ns/prov#",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}

MEANINGS = {
    "prompt_id": "Id of the prompt.",
    "candidate_id": "Id of the response among those of its prompt.",
    "source": "Where the response comes from.",
    "messages": "Prompt and response in chat form.",
    "input_ids": "Token ids of prompt and response: the authority on tokens.",
    "loss_mask": "True on tokens with loss.",
    "labels": "input_ids, and -100 where there is no loss.",
    "target_logprobs": "log p of each token with loss under the target policy.",
    "behavior_logprobs": "log p of each token with loss under the behavior policy.",
    "behavior_known": "True where behavior_logprobs holds the behavior policy's number.",
    "loss_weights": "What each token's loss is multiplied by; 0 where there is no loss.",
    "weight_source": "What made the weights: a method, or uniform.",
    "grape_score": "Mean log p of the response's tokens under the target policy.",
    "grape_rank": "Place of grape_score among the prompt's candidates; 1 is best.",
    "grape_margin": "Lead of grape_score over the next best.",
    "select_score": "What the select method chose by.",
    "select_rank": "Place of select_score among the prompt's candidates; 1 is best.",
    "select_margin": "Lead of select_score over the next best.",
    "margin_at_least": "Whether the margin is to a response that was not scored to its end, so that it may be larger.",
    "num_candidates": "Candidates of the prompt that could be chosen.",
    "truncated": "Whether the response was cut off while it was sampled.",
    "sampling": "How the response was sampled, as JSON.",
    "prefill": "Words that the response's turn begins with, which the policy was given and which have no loss.",
    "tools": "Tools that the prompt offers, as JSON.",
    "target_entropy": "Entropy of the target policy at each token with loss, in nats.",
    "target_rank": "1 + the number of tokens that the target policy finds more probable, at each token with loss.",
    "target_top20_entropy": "Entropy of the target policy's 20 most probable tokens, in nats.",
}
"""What a release's own columns hold; others are the pool's."""


def render_croissant(manifest: Manifest, root: str) -> str:
    """The text of croissant.json for a version in the folder of datasets at `root`."""
    value = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "@id": f"{root}/{manifest.name}@{manifest.version}",
        "conformsTo": CONFORMS_TO,
        "name": manifest.name,
        "description": _description(manifest),
        "version": f"{int(manifest.version.removeprefix('v'))}.0.0",
        "datePublished": manifest.created,
        "url": f"{root}/{manifest.name}/versions/{manifest.version}",
        "license": manifest.licenses,
        "isLiveDataset": False,
        "distribution": _distribution(manifest),
        "recordSet": [_record_set(manifest)],
        **_derivation(manifest),
        **_responsible_ai(manifest),
    }
    return json_bytes({key: item for key, item in value.items() if item not in (None, [])}).decode()


def _description(manifest: Manifest) -> str:
    if manifest.kind == "candidates":
        return f"{manifest.content}: a pool, not a training set; version {manifest.version} of {manifest.name}."
    method = (manifest.config.get("select") or {}).get("method", "all")
    return (
        f"{manifest.rows:,} rows with {manifest.tokens:,} tokens for supervised fine-tuning, selected by {method}; "
        f"version {manifest.version} of {manifest.name}."
    )


def _distribution(manifest: Manifest) -> list[JsonObject]:
    files = [
        {
            "@type": "cr:FileObject",
            "@id": entry.path,
            "name": entry.path,
            "contentUrl": entry.path,
            "contentSize": f"{entry.size} B",
            "encodingFormat": PARQUET,
            "sha256": entry.sha256,
        }
        for entry in manifest.files
    ]
    parts = {
        "@type": "cr:FileSet",
        "@id": "parts",
        "name": "parts",
        "description": "The data files, in order.",
        "encodingFormat": PARQUET,
        "includes": "data/part-*.parquet",
    }
    return [*files, parts]


def _record_set(manifest: Manifest) -> JsonObject:
    return {
        "@type": "cr:RecordSet",
        "@id": "rows",
        "name": "rows",
        "description": "One response to one prompt, as tokens with masks and weights.",
        "key": [{"@id": "rows/prompt_id"}, {"@id": "rows/candidate_id"}],
        "field": [_field(f"rows/{column.name}", column.name, column.type) for column in manifest.columns],
    }


def _field(id_: str, column: str, kind: str) -> JsonObject:
    """A column; one of objects has a field for each of theirs."""
    is_list, inner = kind.startswith("list<"), kind
    if is_list:
        inner = kind.removeprefix("list<").removesuffix(">")
    value: JsonObject = {
        "@type": "cr:Field",
        "@id": id_,
        "name": id_,
        "description": MEANINGS.get(column, "A column of the pool."),
        "repeated": is_list or None,
    }
    source = {"fileSet": {"@id": "parts"}, "extract": {"column": column}}
    if inner.startswith("struct<"):
        names = _names(inner.removeprefix("struct<").removesuffix(">"))
        value["subField"] = [
            {
                "@type": "cr:Field",
                "@id": f"{id_}/{name}",
                "name": f"{id_}/{name}",
                "dataType": _data_type(type_),
                "source": {**source, "transform": {"jsonPath": name}},
            }
            for name, type_ in names.items()
        ]
    else:
        value |= {"dataType": _data_type(inner), "source": source}
    return {key: item for key, item in value.items() if item is not None}


def _names(fields: str) -> dict[str, str]:
    """'a: string, b: list<c: int32>' by name: types may hold commas of their own, between < and >."""
    found, depth, start = {}, 0, 0
    for place, character in enumerate([*fields, ","]):
        depth += (character == "<") - (character == ">")
        if character == "," and depth == 0:
            name, _, type_ = fields[start:place].strip().partition(": ")
            found[name] = type_
            start = place + 1
    return found


def _data_type(kind: str) -> str:
    """Croissant's word for an Arrow type as the manifest writes it; what it has no word for is text."""
    words = {
        "bool": "sc:Boolean",
        "int": "sc:Integer",
        "uint": "sc:Integer",
        "float": "sc:Float",
        "double": "sc:Float",
        "decimal": "sc:Float",
        "timestamp": "sc:DateTime",
        "date": "sc:Date",
    }
    return next((word for start, word in words.items() if kind.startswith(start)), "sc:Text")


def _derivation(manifest: Manifest) -> JsonObject:
    """PROV: pool files, prompts that were sampled for, policies, the release that was weighed again, the code."""
    parents = manifest.parents
    entities: list[JsonObject] = [
        {"@type": "prov:Entity", "@id": item.path, "sc:identifier": item.digest or item.etag} for item in parents.pool
    ]
    in_pool = {item.path for item in parents.pool}
    entities += [
        {"@type": "prov:Entity", "@id": item.path, "sc:identifier": item.digest or item.etag, "prov:label": "prompts"}
        for item in parents.prompts
        if item.path not in in_pool
    ]
    if parents.all_files:
        entities.append({"@type": "prov:Entity", "@id": POOL_FILES, "prov:label": "all of the pool's files"})
    entities += [_policy(policy) for policy in parents.policies]
    if parents.release:
        entities.append({"@type": "prov:Entity", "@id": parents.release, "prov:label": "weighed again"})
    entities = [{key: item for key, item in entity.items() if item is not None} for entity in entities]
    activity: JsonObject = {"@type": "prov:Activity", "prov:label": "score, select, weigh, release"}
    if parents.code is not None:
        agent = f"grape-service {parents.code.package_version}"
        activity["prov:wasAssociatedWith"] = {"@type": "prov:SoftwareAgent", "prov:label": agent}
    if parents.run_id:
        activity["@id"] = f"urn:grape-service:run:{parents.run_id}"
    return {"prov:wasDerivedFrom": entities or None, "prov:wasGeneratedBy": activity}


def _policy(policy: PolicyUse) -> JsonObject:
    return {
        "@type": "prov:Entity",
        "@id": f"urn:grape-service:policy:{policy.policy_id}",
        "prov:label": f"{policy.role}: {policy.model}",
        "sc:version": policy.revision,
        "sc:identifier": policy.weights_digest,
    }


def _responsible_ai(manifest: Manifest) -> JsonObject:
    pool = manifest.counts.get("pool")
    method = (manifest.config.get("select") or {}).get("method", "all")
    reasons = (pool.get("rejected_by_reason") if isinstance(pool, dict) else None) or {}
    left_out = ", ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items()))
    known = {
        "rai:dataCollection": "Candidate responses were collected beforehand; this version is a selection of them.",
        "rai:dataPreprocessingProtocol": f"Rejected pool rows: {left_out}." if left_out else None,
        "rai:dataManipulationProtocol": f"Responses were selected by {method}: {manifest.rows:,} rows kept.",
        "rai:dataUseCases": "Supervised fine-tuning of the target policy, before reinforcement learning.",
        "rai:dataBiases": (
            "Winners lean to the target's own family and to its own samples." if method == "grape" else None
        ),
    }
    return {key: value for key, value in known.items() if value is not None}

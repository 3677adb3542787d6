"""KubeRay's schemas, where the environment variable KUBERAY names their folder, used as an API server would not: it
drops fields that it does not know without a word."""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

METADATA = {"name", "namespace", "labels", "annotations"}
needed = pytest.mark.skipif(
    "KUBERAY" not in os.environ, reason="the environment variable KUBERAY names no folder of schemas"
)


def problems(resource: dict[str, Any]) -> list[str]:
    """Why KubeRay would not take a RayJob or RayCronJob, or would take less than is written."""
    schema = json.loads((Path(os.environ["KUBERAY"]) / f"{resource['kind'].lower()}s.v1.schema.json").read_text())
    wrong = [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(resource)]
    return [*wrong, *(f"metadata.{key}" for key in resource["metadata"].keys() - METADATA), *unknown(resource, schema)]


def unknown(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """Fields that a schema does not name."""
    if isinstance(value, list):
        return [found for one in value for found in unknown(one, schema.get("items", {}), f"{where}[]")]
    known = schema.get("properties")
    if not isinstance(value, dict) or known is None:  # of free keys, such as labels
        return []
    found = [f"{where}.{key}".lstrip(".") for key in value.keys() - known.keys()]
    return found + [
        one for key in value.keys() & known.keys() for one in unknown(value[key], known[key], f"{where}.{key}")
    ]

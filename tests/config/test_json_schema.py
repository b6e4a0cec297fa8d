"""The JSON schema of the configuration, for editors."""

import jsonschema
import yaml

from config.schema import Settings
from tests.fakes.running import ROOT


def test_the_example_matches_the_schema() -> None:
    """Sizes and adapters may be text there, as in a file that the gateway reads."""
    example = yaml.safe_load((ROOT / "config" / "example.yaml").read_text())
    jsonschema.Draft202012Validator(Settings.model_json_schema()).validate(example)

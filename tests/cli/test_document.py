# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from lbagent.cli.document import schema

PAGE = Path(__file__).resolve().parents[2] / "docs/reference/plan.schema.json"


def test_the_schema_in_the_docs_is_that_of_the_code(update_golden: bool) -> None:
    if update_golden:
        PAGE.write_text(schema())
    assert PAGE.read_text() == schema()

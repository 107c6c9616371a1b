"""Reads Terraform files: terraform.py VALUES FILE... prints JSON.

Terraform itself is in no package registry that this project uses, so this checks what a parser can: that the files parse, and
that each reference leads to a declaration. It fails otherwise. It prints the data sources `aws_iam_policy_document` as the
policies that Terraform makes of them (documentation of terraform-provider-aws, `aws_iam_policy_document`). VALUES is a JSON
object: what the references in them stand for.
"""

import json
import re
import sys

import hcl2

values = json.loads(sys.argv[1])
declared, text, documents = set(), "", {}


def bare(value):
    return value.strip('"')


def filled(value):
    return re.sub(r"\$\{([^{}]+)\}", lambda reference: values[reference[1]], bare(value))


def filled_list(items):
    items = [filled(item) for item in items]
    return items[0] if len(items) == 1 else items


def statement(block):
    known = {"sid", "effect", "actions", "resources", "principals", "condition"}
    unknown = {name for name in block if not name.startswith("__")} - known
    assert not unknown, unknown
    made = {"Sid": bare(block.get("sid", "")), "Effect": bare(block.get("effect", "Allow"))}
    for principals in block.get("principals", []):
        kind, identifiers = bare(principals["type"]), filled_list(principals["identifiers"])
        made["Principal"] = "*" if kind == "*" else {kind: identifiers}
    made["Action"] = filled_list(block["actions"])
    if "resources" in block:
        made["Resource"] = filled_list(block["resources"])
    for condition in block.get("condition", []):
        test = made.setdefault("Condition", {}).setdefault(bare(condition["test"]), {})
        test[bare(condition["variable"])] = filled_list(condition["values"])
    return made


for path in sys.argv[2:]:
    with open(path) as file:
        parsed = hcl2.load(file)
    text += json.dumps(parsed)
    for kind, prefix in (("variable", "var."), ("resource", ""), ("data", "data.")):
        for block in parsed.get(kind, []):
            for first, inner in block.items():
                if kind == "variable":
                    declared.add(f"var.{bare(first)}")
                    continue
                for second, body in inner.items():
                    declared.add(f"{prefix}{bare(first)}.{bare(second)}")
                    if bare(first) == "aws_iam_policy_document":
                        documents[bare(second)] = {
                            "Version": "2012-10-17",
                            "Statement": [statement(block) for block in body["statement"]],
                        }
    for block in parsed.get("locals", []):
        declared.update(f"local.{name}" for name in block)

references = set(re.findall(r"(?<![\w.])((?:data\.)?aws_\w+\.\w+|var\.\w+|local\.\w+)", text))
missing = references - declared
assert references and not missing, missing
print(json.dumps(documents))

"""Metrics, alert rules and dashboards, as the parsers of others read them.

prometheus.py openmetrics            reads /metrics from standard input, as OpenMetrics
prometheus.py text                   the same, as the Prometheus text format 0.0.4
prometheus.py expressions FILE       every expression of a rule file or a dashboard

Prints JSON, a line a family or an expression; fails on what cannot be parsed.
"""

import json
import re
import sys

import promql_parser
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text


def families(parse):
    for family in parse(sys.stdin.read()):
        samples = [{"name": s.name, "labels": s.labels, "value": str(s.value)} for s in family.samples]
        print(json.dumps({"name": family.name, "type": family.type, "unit": family.unit,
                          "help": family.documentation, "samples": samples}))


def walk(node, selectors, labels):
    """Collects the selectors of an expression, and the labels that are grouped or matched by."""
    kind = type(node).__name__
    if kind == "VectorSelector":
        matchers = [{"name": m.name, "op": str(m.op), "value": m.value} for m in node.matchers.matchers]
        selectors.append({"name": node.name, "matchers": matchers})
    elif kind == "MatrixSelector":
        walk(node.vector_selector, selectors, labels)
    elif kind == "AggregateExpr":
        if node.modifier is not None:
            labels.extend(node.modifier.labels)
        walk(node.expr, selectors, labels)
    elif kind == "BinaryExpr":
        if node.modifier is not None and node.modifier.matching is not None:
            labels.extend(node.modifier.matching.labels)
        walk(node.lhs, selectors, labels)
        walk(node.rhs, selectors, labels)
    elif kind == "Call":
        for arg in node.args:
            walk(arg, selectors, labels)
    elif kind in ("ParenExpr", "UnaryExpr", "SubqueryExpr"):
        walk(node.expr, selectors, labels)
    elif kind not in ("NumberLiteral", "StringLiteral"):
        sys.exit(f"what is a {kind}?")


def expression(where, expr, shown=""):
    # What Grafana puts in before it asks.
    plain = expr.replace("$__rate_interval", "5m")
    selectors, labels = [], []
    walk(promql_parser.parse(plain), selectors, labels)
    # Labels that a legend or a summary shows.
    labels += re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", shown)
    print(json.dumps({"where": where, "expr": expr, "selectors": selectors, "labels": labels}))


def expressions(path):
    with open(path, encoding="utf-8") as file:
        if path.endswith(".json"):
            dashboard(json.load(file))
        else:
            rules(yaml.safe_load(file))


def rules(document):
    for group in document["groups"]:
        for rule in group["rules"]:
            notes = rule["annotations"]
            if not (rule["labels"]["severity"] in ("warning", "critical") and notes["summary"]
                    and re.fullmatch(r"docs/runbook\.md#[a-z-]+", notes["runbook"])):
                sys.exit(f"{rule['alert']} lacks a severity, a summary or a runbook")
            expression(rule["alert"], rule["expr"], notes["summary"])


def dashboard(document):
    ids = [panel["id"] for panel in document["panels"]]
    if len(ids) != len(set(ids)):
        sys.exit("two panels have one id")
    known = {variable["name"] for variable in document["templating"]["list"]} | {"__rate_interval", "__all"}
    for name in re.findall(r"\$\{?(\w+)", json.dumps(document)):
        if name not in known:
            sys.exit(f"there is no variable {name}")
    for variable in document["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            expression("variable " + variable["name"], asked[1], "{{" + asked[2] + "}}")
    for panel in document["panels"]:
        for target in panel.get("targets", []):
            expression(panel["title"], target["expr"], target["legendFormat"])


match sys.argv[1:]:
    case ["openmetrics"]:
        families(openmetrics)
    case ["text"]:
        families(text)
    case ["expressions", path]:
        expressions(path)
    case _:
        sys.exit(__doc__)

"""Texts to record on: prose and code that every Python installation carries, and generated records."""

import csv
import importlib
import inspect
import io
import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rheo_offload.eval.texts import prose_paragraphs

__all__ = ["TEXTS"]

# Modules in the order of reading; each text is far longer than what is recorded.
_DOCUMENTED = (
    "datetime", "decimal", "collections", "itertools", "functools", "pathlib", "subprocess", "threading", "socket",
    "argparse", "logging", "random", "statistics", "fractions", "ssl", "email.message", "http.client", "tarfile",
    "zipfile", "shutil", "tempfile", "unittest.case", "asyncio.events", "typing", "os", "re", "string", "difflib",
)  # fmt: skip
_SOURCES = ("argparse.py", "dataclasses.py", "configparser.py")
_PACKAGE_SOURCES = ("asyncio/base_events.py", "asyncio/selector_events.py")


def _reference() -> str:
    """Prose: the language reference."""
    return "\n\n".join(prose_paragraphs())


def _docstrings() -> str:
    """Prose in short pieces: docstrings of the standard library."""
    found: list[str] = []
    for name in _DOCUMENTED:
        module = importlib.import_module(name)
        found.append(f"{name}\n\n{inspect.getdoc(module) or ''}")
        for member, value in inspect.getmembers(module, inspect.isclass):
            members = [(member, value), *inspect.getmembers(value, inspect.isroutine)]
            found += [f"{name}.{member} {label}\n{doc}" for label, v in members if (doc := v.__doc__)]
    return "\n\n".join(dict.fromkeys(found))


def _source(*names: str) -> Callable[[], str]:
    def text() -> str:
        root = Path(sysconfig.get_path("stdlib"))
        return "\n\n".join(f"# {name}\n{(root / name).read_text(encoding='utf-8')}" for name in names)

    return text


def _log_records() -> Iterator[dict[str, object]]:
    rng = random.Random(1)
    users = [f"u{rng.randrange(10**5):05d}" for _ in range(40)]
    hosts = [f"{zone}-{n:02d}" for zone in ("eu-west", "us-east", "ap-south") for n in range(6)]
    paths = [
        "/login",
        "/cart",
        "/cart/items",
        "/orders",
        "/orders/{}",
        "/search",
        "/users/{}",
        "/health",
        "/metrics",
    ]
    now = datetime(2026, 1, 5, 8, tzinfo=UTC)
    while True:
        now += timedelta(milliseconds=rng.randrange(5, 4000))
        status = rng.choices([200, 201, 304, 400, 404, 500, 503], [70, 8, 8, 4, 5, 3, 2])[0]
        record: dict[str, object] = {
            "time": now.isoformat(timespec="milliseconds"),
            "host": rng.choice(hosts),
            "user": rng.choices(users, range(1, 41))[0],
            "method": rng.choice(["GET", "GET", "GET", "POST", "DELETE"]),
            "path": rng.choice(paths).format(rng.randrange(1000)),
            "status": status,
            "ms": round(rng.lognormvariate(3, 1), 1),
        }
        if status >= 500:
            record["error"] = rng.choice(["upstream timed out", "pool exhausted", "connection reset by peer"])
        yield record


def _json_log() -> str:
    """Structured: a request log, one JSON object a line."""
    records = _log_records()
    return "\n".join(json.dumps(next(records)) for _ in range(1000))


def _csv_orders() -> str:
    """Structured: a table of orders whose customers and products come back."""
    rng = random.Random(2)
    names = [
        f"{a} {b}"
        for a in ("Ada", "Ben", "Chi", "Dana", "Emre", "Fay")
        for b in ("Holm", "Ito", "Kaur", "Lund")
    ]
    products = [
        (f"{k}-{n}", rng.randrange(5, 400))
        for k in ("lamp", "desk", "chair", "shelf")
        for n in range(100, 112)
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["order", "date", "customer", "product", "quantity", "price", "total", "city"])
    for order in range(10001, 12001):
        product, price = rng.choice(products)
        quantity = rng.choices([1, 2, 3, 10], [60, 25, 10, 5])[0]
        date = datetime(2026, 2, 1, tzinfo=UTC) + timedelta(hours=order - 10001)
        city = rng.choice(["Oslo", "Lyon", "Graz", "Turin", "Leeds", "Porto"])
        line = [
            order,
            f"{date:%Y-%m-%d}",
            rng.choice(names),
            product,
            quantity,
            price,
            price * quantity,
            city,
        ]
        writer.writerow(line)
    return out.getvalue()


TEXTS: dict[str, Callable[[], str]] = {
    "prose-reference": _reference,
    "code-modules": _source(*_SOURCES),
    "json-log": _json_log,
    "prose-docstrings": _docstrings,
    "code-asyncio": _source(*_PACKAGE_SOURCES),
    "csv-orders": _csv_orders,
}

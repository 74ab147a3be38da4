"""Pre-caching with a real daemon and a real Glance: what an operator asks, sees, and finds after a restart."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.cloud import Glance
from tests.cloud.service import poll_until
from tests.node import Node
from tests.stores import random_bytes

pytestmark = [pytest.mark.mount, pytest.mark.cloud]

MIB = 1 << 20
NOSUCH = "nothing that is installed has an entry point nosuch in cachefs.precache.policies"


def state(node: Node, image: str) -> str:
    return os.getxattr(node.path(image), "user.cachefs.state").decode()


def one(node: Node, image: str) -> dict[str, Any]:
    return dict(node.ask("image", image=image))


def evicted(node: Node, image: str) -> str | None:
    """None where it went, else why not."""
    (row,) = node.ask("evict", images=[image])
    return None if row["error"] is None else str(row["error"])


def test_what_policies_want_is_explained_then_held_and_outlives_a_restart(glance: Glance, tmp_path: Path) -> None:
    content = [random_bytes(n, MIB) for n in range(4)]
    wanted = {"cachefs_precache": "true", "os_distro": "ubuntu", "hw_disk_bus": "scsi"}
    held = glance.upload("precached", content[0], **wanted)
    tagged = glance.upload("tagged", content[1], tags=["other", "cachefs_precache"])
    pinned = glance.upload("pinned", content[2], cachefs_precache="pin", cachefs_priority="critical")
    plain = glance.upload("plain", content[3])
    node = Node(tmp_path, glance.endpoint, glance={"listing_ttl": 0})
    node.configure(
        precache={"policies": "property, nosuch"}, priorities={"trust_properties": "all", "low": f"id:{plain}"}
    )
    with node:
        # What would be done, and nothing of it is.
        dry = node.cli("precache", "--dry-run", "--json")
        assert (dry.returncode, dry.stderr) == (
            1, f"cachefs: policy nosuch failed, what it decided last stands: LookupError: {NOSUCH}\n",
        )  # fmt: skip
        said = json.loads(dry.stdout)
        rows = {row["image"]: row for row in said["rows"]}
        assert set(rows) >= {held, tagged, pinned}
        assert plain not in rows
        assert rows[held]["reason"] == "property cachefs_precache=true"
        assert rows[tagged]["reason"] == "tag cachefs_precache"
        assert [rows[image]["keep"] for image in (held, tagged, pinned)] == ["hold", "hold", "hold and pin"]
        assert [rows[image]["cost"] for image in (held, tagged, pinned)] == [MIB] * 3
        assert said["rows"][0]["image"] == pinned, "critical before all others"
        table = node.cli("precache", "--dry-run").stdout.splitlines()
        assert table[0].split() == [
            "ID",
            "NAME",
            "DECISION",
            "POLICY",
            "REASON",
            "SIZE",
            "TO",
            "FETCH",
            "WHY",
            "NOT",
        ]
        assert table[1].split()[:6] == [pinned, "pinned", "hold", "and", "pin", "property"]
        assert table[-1].endswith("; nothing was done")
        assert {state(node, image) for image in (held, tagged, pinned, plain)} == {"absent"}
        assert node.status()["precache"]["held_images"] == 0

        # And now it is done.
        assert node.cli("precache").returncode == 1, "one policy is not there"
        assert poll_until(lambda: all(state(node, i) == "verified" for i in (held, tagged, pinned)), 30)
        assert state(node, plain) == "absent"
        status = node.status()["precache"]
        assert status["failed"] == {"nosuch": f"LookupError: {NOSUCH}"}
        assert status["pinned_images"] == 1
        lines = node.cli("status").stdout.splitlines()
        assert "pre-cached:  3 images, 3.0 MiB of 3.0 MiB; 1 pinned" in lines
        assert f"policies:    nosuch failed: LookupError: {NOSUCH}" in lines
        assert node.path(pinned).read_bytes() == content[2]
        why = "it is pinned by a policy (property) ([precache] in the configuration)"
        assert evicted(node, pinned) == f"image {pinned} is not evicted: {why}"
        assert node.ask("unpin", images=[pinned])[0]["was_pinned"] is False
        assert evicted(node, pinned) is not None, "it is not people's to take away"
        shown = one(node, pinned)
        assert (shown["priority"], shown["priority_because"]) == ("critical", "property cachefs_priority")
        assert shown["held_because"] == "held and pinned by property: property cachefs_precache=pin"
        assert shown["opens"] > 0.9
        assert one(node, held)["properties"] == {"cachefs_precache": "true", "os_distro": "ubuntu"}
        assert os.getxattr(node.path(pinned), "user.cachefs.priority") == b"critical"
        assert os.getxattr(node.path(plain), "user.cachefs.priority") == b"low"
        listed = {line.split()[0]: line for line in node.cli("images").stdout.splitlines()}
        assert "PRIORITY" in listed["ID"]
        assert " critical " in listed[pinned]

        # Without Glance nothing changes, over a restart too.
        node.stop()
        node.configure(glance={"endpoints": "http://127.0.0.1:1"})
        node.start()
        away = node.cli("precache")
        assert away.returncode == 1
        assert away.stderr.startswith("cachefs: nothing changes: Glance does not say which images there are: ")
        assert node.status()["precache"]["pinned_images"] == 1
        assert evicted(node, pinned) is not None

        # The pin is taken away with the property.
        node.stop()
        glance.update(pinned, cachefs_precache="false")
        node.configure(glance={"endpoints": glance.endpoint}, precache={"policies": "property"})
        node.start()
        done = json.loads(node.cli("precache", "--json").stdout)
        assert [row["image"] for row in done["let_go"]] == [pinned]
        assert evicted(node, pinned) is None
        assert state(node, held) == "verified"
    glance.update(held, cachefs_precache="false")
    glance.update(tagged, tags=[])


def test_a_tenants_image_is_explained_and_refused(glance: Glance, tmp_path: Path) -> None:
    image = glance.upload("mine", random_bytes(9, MIB), cachefs_precache="pin", cachefs_priority="critical")
    node = Node(tmp_path, glance.endpoint)
    node.configure(precache={"policies": "property, static", "static_images": "nobody has this name"})
    with node:
        done = node.cli("precache")
        assert (done.returncode, done.stderr) == (0, "")
        (row,) = (line for line in done.stdout.splitlines() if line.startswith(image))
        assert "refused" in row
        assert row.endswith("its owner's word is not trusted ([priorities] trust_properties)")
        (row,) = (line for line in done.stdout.splitlines() if line.startswith("nobody"))
        assert row.endswith("Glance lists no such active image")
        assert one(node, image)["priority"] == "normal"
        assert node.status()["precache"]["held_images"] == 0
    glance.update(image, cachefs_precache="false")

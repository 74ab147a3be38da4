"""Nova's own code at work on a folder of images: for an interpreter that has nova, which the tests' own has not.
Rule: of Nova nothing is replaced but its database, its privileged daemon and libvirt.

    python nova_itself.py INSTANCES GLANCE KNOWN UNKNOWN DEACTIVATED

INSTANCES is Nova's instances_path, GLANCE where Nova fetches images from that it does not find below. What it saw
is JSON on standard output.
"""

# mypy: ignore-errors

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from types import SimpleNamespace

import nova.conf
from nova import context as nova_context
from nova import objects
from nova.privsep import sys_admin_pctxt
from nova.virt import images
from nova.virt.libvirt import driver, imagebackend, imagecache, utils

CONF = nova.conf.CONF
INSTANCES, GLANCE, KNOWN, UNKNOWN, DEACTIVATED = sys.argv[1:]
BASES = os.path.join(INSTANCES, "_base")
DISK = {"bus": "virtio", "dev": "vda", "type": "disk"}
GIB = 1 << 30
DAY_S = 86400

CONF([], project="nova", default_config_files=[])
CONF.set_override("instances_path", INSTANCES)
CONF.set_override("state_path", os.path.dirname(INSTANCES))
CONF.set_override("lock_path", os.path.join(INSTANCES, "locks"), "oslo_concurrency")
CONF.set_override("endpoint_override", GLANCE, "glance")
CONF.set_override("host", "here")
sys_admin_pctxt.set_client_mode(False)  # This process is root: what is privileged is done here.
objects.register_all()
objects.BlockDeviceMappingList.bdms_by_instance_uuid = staticmethod(lambda context, uuids: {})

context = nova_context.RequestContext("user", "project", auth_token="token", is_admin=True, service_catalog=[])
fetched: list[str] = []
saw: dict[str, object] = {"fetched": fetched}


def fetch_to_raw(context, image_href, path, trusted_certs=None, fetch=images.fetch_to_raw):
    fetched.append(image_href)
    return fetch(context, image_href, path, trusted_certs)


images.fetch_to_raw = fetch_to_raw


def disk(instance: str, name: str = "disk", kind: type = imagebackend.Qcow2):
    folder = os.path.join(INSTANCES, instance)
    os.makedirs(folder, exist_ok=True)
    return kind(path=os.path.join(folder, name), disk_info_mapping=DISK)


def cache(instance: str, image: str, kind: type = imagebackend.Qcow2) -> None:
    """As `_try_fetch_image_cache` does it."""
    disk(instance, kind=kind).cache(
        fetch_func=utils.fetch_image,
        context=context,
        filename=imagecache.get_cache_fname(image),
        image_id=image,
        size=GIB,
        trusted_certs=None,
    )


def instance(uuid: str, image: str):
    return SimpleNamespace(
        name=uuid, uuid=uuid, task_state=None, vm_state="active", host="here", image_ref=image, kernel_id=None,
        ramdisk_id="", os_type=None,
    )  # fmt: skip


def bases() -> list[str]:
    return sorted(os.listdir(BASES))


libvirt = driver.LibvirtDriver

# Spawning, on a copy-on-write disk and on a copy.
cache("overlay", KNOWN)
cache("copy", KNOWN, kind=imagebackend.Flat)
saw["fetched for what is there"] = list(fetched)
# Pre-caching says whether it had to do something.
saw["precached"] = libvirt.cache_image(None, context, KNOWN)
# An ephemeral disk and a swap.
disk("overlay", "disk.eph0").cache(
    fetch_func=lambda target, ephemeral_size, **words: libvirt._create_ephemeral(
        target, ephemeral_size, fs_label="ephemeral0", os_type="linux"
    ),
    filename="ephemeral_1_0706d66",
    size=GIB,
    ephemeral_size=1,
    safe=True,
)
disk("overlay", "disk.swap").cache(
    fetch_func=lambda target, swap_mb: libvirt._create_swap(target, swap_mb),
    filename="swap_64",
    size=64 << 20,
    swap_mb=64,
    safe=True,
)
# An image that is not to be found there: Nova's own fetch.
cache("fetched", UNKNOWN)
saw["fetched at last"] = list(fetched)
try:
    cache("deactivated", DEACTIVATED)
except Exception as error:  # noqa: BLE001  # Which of Nova's it is, the test looks at.
    saw["deactivated"] = f"{type(error).__name__}: {error}"

# The periodic pass, with all of them used.
saw["bases"] = bases()
imagecache.ImageCacheManager().update(context, [instance("overlay", KNOWN), instance("fetched", UNKNOWN)])
saw["bases in use"] = bases()
saw["known is young"] = time.time() - os.path.getmtime(os.path.join(BASES, imagecache.get_cache_fname(KNOWN))) < 60
# And two days after the last instance is gone.
for name in bases():
    os.utime(os.path.join(BASES, name), (time.time() - 2 * DAY_S,) * 2)
for name in ("copy", "fetched"):
    shutil.rmtree(os.path.join(INSTANCES, name))
os.rename(os.path.join(INSTANCES, "overlay"), os.path.join(INSTANCES, "kept"))  # Nova knows nothing of it.
imagecache.ImageCacheManager().update(context, [])
saw["bases unused"] = bases()
saw["usage"] = imagecache.ImageCacheManager().get_disk_usage()
# A hard reboot of an instance whose base was removed.
cache("kept", KNOWN)
saw["bases at the end"] = bases()
json.dump(saw, sys.stdout)

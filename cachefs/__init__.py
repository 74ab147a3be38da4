"""cachefs: a FUSE filesystem in which every Glance image is already there.

Follow one read(2) by file names: `fuse` → `views/stored` → `blocks` → `store/view` for what is here,
or → `fetcher` → `sources/glance` → `store/writer` for what is not.
"""

__version__ = "0.1.0"

"""A real Glance and a real Keystone on loopback. Rule: nothing here imports pytest or cachefs.

Tests, demo and benchmarks all stand on it.
"""

from tests.cloud.glance import Glance
from tests.cloud.keystone import Keystone
from tests.cloud.service import Service, ServiceDied, ServiceStuck

__all__ = ["Glance", "Keystone", "Service", "ServiceDied", "ServiceStuck"]

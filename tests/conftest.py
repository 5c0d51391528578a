"""What every test runs under: no network, no Hub, one thread. Set before any library is imported, so that it holds."""

import ipaddress
import os
import signal
import socket
import sys

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# A suite started in the background (`make test &`) ignores Ctrl-C, and so would every process that its tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def is_local(host: object) -> bool:
    """Whether a host, as given to connect or getaddrinfo, is this machine."""
    if isinstance(host, bytes | bytearray):
        host = host.decode()
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps the first precision of a process for all that follows; each test chooses its own."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state()


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Connections and name look-ups that leave the machine raise; loopback and Unix sockets work.

    Child processes are out of reach of this patch: there the offline variables above hold.
    """
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(host):
        raise RuntimeError(f"a test reached for the network: {host!r}. Tests run on local files and loopback only.")

    def guarded(original):
        def method(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
                refuse(address)
            return original(self, address)

        return method

    def guarded_getaddrinfo(host, *args, **kwargs):
        if not is_local(host):
            refuse(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(connect))
        patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield

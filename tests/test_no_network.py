"""The suite cannot reach the network: the guard of conftest.py holds, and lets loopback through."""

import os
import socket
import urllib.request

import pytest

OUTSIDE = "192.0.2.1"  # reserved for documentation: nothing answers there


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, (OUTSIDE, 80)), (socket.AF_INET6, ("2001:db8::1", 80, 0, 0))]
)
def test_a_connection_to_the_outside_is_refused(method, family, address):
    with socket.socket(family) as outgoing:
        outgoing.settimeout(0.1)
        with pytest.raises(RuntimeError, match="reached for the network"):
            getattr(outgoing, method)(address)


def test_a_name_is_not_looked_up():
    with pytest.raises(RuntimeError, match=r"'huggingface\.co'"):
        urllib.request.urlopen("http://huggingface.co", timeout=0.1)


def test_loopback_and_unix_sockets_work(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        client.connect(str(tmp_path / "socket"))


def test_hugging_face_libraries_are_offline():
    import huggingface_hub.constants
    import huggingface_hub.errors

    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
        huggingface_hub.hf_hub_download("gpt2", "config.json", cache_dir="/nonexistent")

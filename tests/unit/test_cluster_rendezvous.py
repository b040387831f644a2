"""Rank 0's store listens where it says, and nowhere else."""

from pathlib import Path

import pytest

from rayllm_cluster.rendezvous import bind_store, connect_store


def listening_addresses(port: int) -> list[str]:
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]


def test_the_port_is_the_systems_choice_and_the_host_is_not() -> None:
    stores = [bind_store("127.0.0.1", world_size=2, timeout_s=5) for _ in range(3)]
    assert len({store.port for store in stores}) == 3
    for i, store in enumerate(stores):
        assert listening_addresses(store.port) == ["0100007F"]
        store.set("who", str(i))
        client = connect_store("127.0.0.1", store.port, world_size=2, timeout_s=5)
        assert client.get("who") == str(i).encode()


def test_an_address_of_another_node_is_refused_at_once() -> None:
    with pytest.raises(OSError, match="assign requested address"):
        bind_store("198.51.100.1", world_size=2, timeout_s=5)

"""This namespace's settings are valid, and their object store takes, gives and removes an object."""

import uuid

from teefusion.settings import load_settings
from teefusion.storage import open_store


def main() -> None:
    settings = load_settings()
    assert settings.storage.uri is not None
    store = open_store(settings.storage.uri, settings.storage)
    name, data = f"helm-test/{uuid.uuid4().hex}", b"TeEFusion"
    store.write(name, data)
    try:
        assert store.read(name) == data
    finally:
        store.delete(name)
    print(f"settings are valid; {store.uri}: an object written, read and removed")


if __name__ == "__main__":
    main()

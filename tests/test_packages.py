import time
from concurrent.futures import ThreadPoolExecutor

from lib.data import packages as corpora


def test_a_package_that_several_want_at_once_is_fetched_once(tmp_path, monkeypatch):
    package = corpora.Package("no-such-package", "usr/share/no-such-sounds", "BSD-like", lambda root, licence: iter(()))
    fetched = []

    def fetch(package, root, hint):
        fetched.append(package.debian)
        time.sleep(0.2)  # while the others wait at the lock
        (root / package.folder).mkdir(parents=True)

    monkeypatch.setattr(corpora, "PACKAGES", tmp_path / "packages")
    monkeypatch.setattr(corpora, "_fetch", fetch)
    monkeypatch.setattr(corpora.shutil, "which", lambda name: name)
    with ThreadPoolExecutor(4) as pool:
        roots = set(pool.map(lambda _: corpora.package_root(package), range(4)))
    assert roots == {tmp_path / "packages" / "no-such-package"} and fetched == ["no-such-package"]

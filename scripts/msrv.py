#!/usr/bin/env python3
"""Compares the Rust version that Cargo.toml promises with those that dependencies ask for, as Cargo.lock has them:

    python3 scripts/msrv.py

`rust-version` is that of the default features; `rust-version-cuda` below `[package.metadata]` that of the feature `cuda`. Neither may
be lower than what a dependency asks for. (What the crate's own code needs: clippy's `incompatible_msrv` and, where that toolchain
is installed, the compiler itself; see .ci/run.)
"""
import json
import subprocess
import sys


def version(text):
    return tuple(int(part) for part in (text or "0").split("."))


def metadata(*features):
    command = ["cargo", "metadata", "--format-version", "1", "--locked", *features]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def most(*features):
    """The dependency that asks for most, and this package."""
    data = metadata(*features)
    packages = {package["id"]: package for package in data["packages"]}
    nodes = {node["id"]: node for node in data["resolve"]["nodes"]}
    root = data["resolve"]["root"]
    seen, left = set(), [root]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        left += [
            dep["pkg"]
            for dep in nodes[node]["deps"]
            # Whoever builds the crate does not build what its tests need.
            if any(kind["kind"] != "dev" for kind in dep["dep_kinds"])
        ]
    asked = max((packages[i] for i in seen - {root}), key=lambda p: version(p["rust_version"]))
    return asked, packages[root]


def main():
    failed = False
    for name, features in (("default", []), ("cuda", ["--features", "cuda"])):
        asked, own = most(*features)
        promised = own["rust_version"] if name == "default" else own["metadata"]["rust-version-cuda"]
        print(f"{name}: {promised} promised; {asked['name']} {asked['version']} asks for {asked['rust_version']}")
        failed |= version(asked["rust_version"]) > version(promised)
    if failed:
        sys.exit("a dependency asks for a newer Rust than Cargo.toml promises")


main()

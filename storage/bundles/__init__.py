"""Bundles: a version of a context, or a span of it, as one checksummed file to be carried to another machine.

`export.export_bundle` writes one, `importer.import_bundle` checks one and brings it into a context. The format is in
docs/storage.md.
"""

from storage.bundles.export import export_bundle
from storage.bundles.importer import ImportResult, import_bundle
from storage.bundles.reader import BundleReader

__all__ = ["BundleReader", "ImportResult", "export_bundle", "import_bundle"]

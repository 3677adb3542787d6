"""Taking a publication back, so that the scores can be published otherwise.

Who does so may be paused or killed anywhere, so a note comes first: `_manifest/withdrawn/<lease>.json` names the
publication. Whoever holds the output next finds the note, builds on nothing of that publication, and takes the rest of
it back. The next publication differs in every file, so a removal that comes late finds nothing that it means.
"""

from batch_rerank.errors import ConflictError
from batch_rerank.store.filesystem import storage_errors
from batch_rerank.store.lease import Lease
from batch_rerank.store.manifest import PUBLICATION, Manifest
from batch_rerank.store.names import OUTPUT_KINDS, PART, TREC_RUN
from batch_rerank.store.receipts import Publication, Withdrawal


def withdraw(manifest: Manifest, publication: Publication, lease: Lease) -> None:
    """Remove what is published: `_SUCCESS` first, so that no reader meets parts of two publications, and the
    publication last. Raises ConflictError where the lease is lost: before the first removal, and behind the last."""
    files = manifest.list_files()
    note, told = manifest.root / f"_manifest/withdrawn/{lease.id}.json", Withdrawal(publication.id).to_json()
    with storage_errors(note):
        note.create_exclusive(told)
        try:
            lease.check()  # held still: every holder after this one sees the note
        except ConflictError:
            note.take_back(told)
            raise
    report = files.matching(OUTPUT_KINDS["report"])
    parts = (*files.matching(PART), *files.within("_manifest/parts"))
    for name in ("_SUCCESS", TREC_RUN, *report, *parts, PUBLICATION):
        manifest.remove_seen(name, files)
    lease.check()


def go_on_withdrawing(manifest: Manifest, lease: Lease) -> None:
    """Take the rest back of a publication that another has begun to withdraw. Raises what `withdraw` raises."""
    publication = manifest.read_publication()
    if publication and publication.id in manifest.read_withdrawn(manifest.list_files("_manifest/withdrawn")).values():
        withdraw(manifest, publication, lease)

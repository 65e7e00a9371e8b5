#include "core/snapshot.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/direct_io_wish.h"
#include "core/pinned_slots.h"
#include "core/python_error.h"
#include "core/wanted_digest.h"
#include "core/watching.h"
#include "pipeline/memory/slot_pool.h"

namespace py = pybind11;

namespace sdio {
namespace {

bool write_fd(Snapshot& snapshot, int fd, const std::string& direct, const py::object& progress,
              double bytes_per_second, const py::object& sha256) {
  WantedDigest digest(sha256);
  WriteOptions options;
  options.bytes_per_second = bytes_per_second;
  options.digest = digest.get();
  const DirectIo direct_io = direct_io_from(direct);
  bool was_direct = false;
  {
    ReleasedGil gil;
    PositionalSink sink(fd, direct_io);
    snapshot.write(sink, options, [&](uint64_t done) { watch(gil, progress, done, snapshot.nbytes()); });
    was_direct = sink.direct();
  }
  digest.give();
  return was_direct;
}

void write_stream(Snapshot& snapshot, const py::object& write, const py::object& progress) {
  ReleasedGil gil;
  snapshot.stream([&](const char* bytes, size_t nbytes) { call_with_view(gil, write, bytes, nbytes); },
                  [&](uint64_t done) { watch(gil, progress, done, snapshot.nbytes()); });
}

}  // namespace

SnapshotOnDevices::SnapshotOnDevices(const Records& records, py::object literals,
                                     const std::vector<size_t>& host_records, std::unique_ptr<PayloadCopies> copies,
                                     std::vector<DeviceBytes> originals, std::unique_ptr<DeviceClones> clones,
                                     std::unique_ptr<DeviceSource> source)
    : records_(records),
      literals_(std::move(literals)),
      copies_(std::move(copies)),
      originals_(std::move(originals)),
      clones_(std::move(clones)),
      source_(std::move(source)) {
  records_.copies = copies_.get();
  records_.devices = source_.get();
  records_.gate = nullptr;
  for (size_t i = 0; i < host_records.size(); ++i) {
    Payload& payload = records_.payloads[host_records[i]];
    payload.kind = Payload::Kind::kCopied;
    payload.copy = i;
  }
}

void SnapshotOnDevices::wait() {
  if (clones_ == nullptr) return;
  {
    const ReleasedGil gil;
    clones_->wait();
  }
  const std::vector<DeviceBytes> let_go = std::exchange(originals_, {});  // which may run Python code
}

SlotPool& snapshot_slots(bool pinned, uint64_t needed_nbytes, uint64_t max_nbytes) {
  SlotPool* pool = &SlotPool::snapshots();
  SlotPool* sibling = &pinned_snapshot_slots();
  if (pinned) std::swap(pool, sibling);
  // What one pool keeps idle gives way to what the other is about to take.
  const uint64_t wanted = pool->nbytes() - pool->idle_nbytes() + needed_nbytes;
  sibling->trim(max_nbytes - std::min(max_nbytes, wanted));
  pool->trim(std::max(wanted, max_nbytes - std::min(max_nbytes, sibling->nbytes())));
  return *pool;
}

void bind_snapshot(py::module_& module) {
  py::class_<Snapshot>(module, "Snapshot")
      .def_property_readonly("nbytes", &Snapshot::nbytes)
      .def("done", &Snapshot::done)
      .def("wait", &Snapshot::wait)
      .def("write_fd", &write_fd, py::arg("fd"), py::kw_only(), py::arg("direct") = "auto",
           py::arg("progress") = py::none(), py::arg("bytes_per_second") = 0.0, py::arg("sha256") = py::none())
      .def("write_stream", &write_stream, py::arg("write"), py::kw_only(), py::arg("progress") = py::none());

  module.def("snapshot_pool_nbytes", [] { return SlotPool::snapshots().nbytes() + pinned_snapshot_slots().nbytes(); });
}

}  // namespace sdio

// Snapshots of planned archives: what is written is the state at the time when they were taken. The Python class is
// _core.Snapshot; its types are in statedict_io/_core.pyi.
//
// All methods need the GIL, but for write() and stream(), which are called without it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/torch.h"
#include "file/positional_sink.h"
#include "pipeline/write/archive_writer.h"
#include "pipeline/write/host_snapshot.h"
#include "pipeline/write/payload_copies.h"
#include "pipeline/write/records.h"

namespace sdio {

class Snapshot {
 public:
  virtual ~Snapshot() = default;

  virtual uint64_t nbytes() const = 0;        // of the file
  virtual bool done() const { return true; }  // whether every byte has been copied
  virtual void wait() {}                      // returns when it has, and lets go of the originals

  // Both may be called again where they have failed.
  virtual void write(PositionalSink& sink, const WriteOptions& options, const Watcher& watch) = 0;
  virtual void stream(const StreamWrite& write, const Watcher& watch) = 0;
};

// The whole file in host memory.
class SnapshotInHostMemory final : public Snapshot {
 public:
  // Without the GIL. As HostSnapshot().
  SnapshotInHostMemory(const Records& records, SlotPool& slots, const Watcher& watch) : file_(records, slots, watch) {}

  uint64_t nbytes() const override { return file_.file_nbytes(); }
  void write(PositionalSink& sink, const WriteOptions& options, const Watcher& watch) override {
    write_snapshot(file_, sink, options, watch);
  }
  void stream(const StreamWrite& write, const Watcher& watch) override { stream_snapshot(file_, write, watch); }

 private:
  HostSnapshot file_;
};

// Copies of the storages, those of storages on devices in the memory of these devices; the file is assembled while it
// is written.
class SnapshotOnDevices final : public Snapshot {
 public:
  // `literals` owns the records that are no storages. Copy i is that of record host_records[i]. `clones` are
  // those of `originals`, which are held until they have been made, and are read through `source`; both are null where
  // nothing is on a device.
  SnapshotOnDevices(const Records& records, pybind11::object literals, const std::vector<size_t>& host_records,
                    std::unique_ptr<PayloadCopies> copies, std::vector<DeviceBytes> originals,
                    std::unique_ptr<DeviceClones> clones, std::unique_ptr<DeviceSource> source);

  uint64_t nbytes() const override { return records_.layout->file_nbytes(); }
  bool done() const override { return clones_ == nullptr || clones_->done(); }
  void wait() override;
  void write(PositionalSink& sink, const WriteOptions& options, const Watcher& watch) override {
    write_archive(records_, sink, options, watch);
  }
  void stream(const StreamWrite& write, const Watcher& watch) override { stream_archive(records_, write, watch); }

 private:
  Records records_;
  const pybind11::object literals_;
  const std::unique_ptr<PayloadCopies> copies_;
  std::vector<DeviceBytes> originals_;
  const std::unique_ptr<DeviceClones> clones_;
  const std::unique_ptr<DeviceSource> source_;
};

// Slots for a snapshot of `needed_nbytes`, pinned or not, of a pool from which so much memory has been given back that
// all snapshots together, and what is kept for the next, stay below `max_nbytes`.
SlotPool& snapshot_slots(bool pinned, uint64_t needed_nbytes, uint64_t max_nbytes);

void bind_snapshot(pybind11::module_& module);

}  // namespace sdio

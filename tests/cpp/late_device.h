// A device whose copies happen when they are waited for: what reuses memory without a wait shows.
#pragma once

#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "pipeline/read/device_destination.h"

namespace sdio {

class LateDevice final : public DeviceDestination {
 public:
  explicit LateDevice(const std::vector<uint64_t>& sizes) {
    for (const uint64_t nbytes : sizes) payloads.emplace_back(nbytes, '\x5a');
  }

  std::unique_ptr<QueuedCopies> copy(const std::vector<ArrivedPiece>& pieces) override {
    return std::make_unique<Copies>(*this, pieces);
  }
  SlotPool& slots() override { return SlotPool::host(); }

  std::vector<std::string> payloads;  // by request
  bool sound = true;                  // every piece lay in its payload

 private:
  class Copies final : public QueuedCopies {
   public:
    Copies(LateDevice& device, const std::vector<ArrivedPiece>& pieces) : device_(device), pieces_(pieces) {}
    ~Copies() override { land(); }
    void wait() override { land(); }

   private:
    void land() {
      const std::lock_guard<std::mutex> lock(device_.mutex_);
      for (const ArrivedPiece& piece : pieces_) {
        std::string& payload = device_.payloads.at(piece.request);
        if (piece.payload_offset > payload.size() || piece.nbytes > payload.size() - piece.payload_offset) {
          device_.sound = false;
        } else {
          std::memcpy(&payload[piece.payload_offset], piece.source, piece.nbytes);
        }
      }
      pieces_.clear();
    }

    LateDevice& device_;
    std::vector<ArrivedPiece> pieces_;
  };

  std::mutex mutex_;
};

}  // namespace sdio

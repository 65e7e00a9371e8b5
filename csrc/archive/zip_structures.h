// Signatures, sizes and bits of the zip structures, for writing and reading them [F: docs/format.md].
#pragma once

#include <cstdint>

namespace sdio {

// [F: Local header], [F: Data descriptor], [F: Central directory], [F: End records]
inline constexpr uint32_t kLocalHeaderSignature = 0x04034b50;
inline constexpr uint32_t kDescriptorSignature = 0x08074b50;
inline constexpr uint32_t kCentralHeaderSignature = 0x02014b50;
inline constexpr uint32_t kDigitalSignatureSignature = 0x05054b50;  // may follow the last central header
inline constexpr uint32_t kZip64EndSignature = 0x06064b50;
inline constexpr uint32_t kZip64LocatorSignature = 0x07064b50;
inline constexpr uint32_t kEndSignature = 0x06054b50;

inline constexpr uint64_t kLocalHeaderNbytes = 30;
inline constexpr uint64_t kCentralHeaderNbytes = 46;
inline constexpr uint64_t kZip64EndNbytes = 56;
inline constexpr uint64_t kZip64LocatorNbytes = 20;
inline constexpr uint64_t kEndNbytes = 22;
inline constexpr uint64_t kExtraFieldHeaderNbytes = 4;
inline constexpr uint32_t kDescriptor32Nbytes = 16;
inline constexpr uint32_t kDescriptor64Nbytes = 24;

inline constexpr uint64_t kMax16 = 0xffff;
inline constexpr uint64_t kMax32 = 0xffffffff;

inline constexpr uint16_t kFlagEncrypted = 1 << 0;
inline constexpr uint16_t kFlagHasDescriptor = 1 << 3;
inline constexpr uint16_t kFlagUtf8Name = 1 << 11;
inline constexpr uint16_t kMethodStored = 0;
inline constexpr uint16_t kMethodDeflate = 8;
inline constexpr uint16_t kZip64ExtraId = 0x0001;

}  // namespace sdio

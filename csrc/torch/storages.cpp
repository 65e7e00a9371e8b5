// Storages between Python, handles and addresses. All but storage_retain() and storage_release() need the GIL.
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Storage.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "boundary/interpreter_exit.h"
#include "torch/functions.h"
#include "torch/raw_bytes.h"

namespace sdio {
namespace {

// What `function` returns; `failed`, with a Python error, where it throws.
template <typename Result, typename Function>
Result or_python_error(Result failed, const Function& function) noexcept {
  try {
    return function();
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    return failed;
  } catch (...) {  // the end of this thread, while a new object is made
    wait_for_exit();
  }
}

// The address of the storage's memory, null where it has none and needs none. Throws what torch's data_ptr() raises,
// for example of tensors under torch.func.functionalize.
const void* data_of(const sdio_storage* handle) {
  const c10::StorageImpl& storage = *impl_of(handle);
  if (storage.device_type() == c10::DeviceType::Meta) return nullptr;
  const void* data = nullptr;
  try {
    data = storage.data();
  } catch (const c10::Error&) {
  }
  if (data == nullptr && storage.sym_nbytes() != 0) {
    PyObject* const wrapped = THPStorage_Wrap(shared(handle));
    PyObject* const address = wrapped == nullptr ? nullptr : PyObject_CallMethod(wrapped, "data_ptr", nullptr);
    Py_XDECREF(wrapped);
    if (address == nullptr) throw python_error();
    Py_DECREF(address);
  }
  return data;
}

// Calls back when the last owner of a storage is gone.
struct Lent {
  void (*release)(void*);
  void* context;
};

void give_back(void* lent) {
  const std::unique_ptr<Lent> owned(static_cast<Lent*>(lent));
  owned->release(owned->context);
}

}  // namespace

sdio_storage* storage_of(PyObject* untyped_storage) noexcept {
  return or_python_error<sdio_storage*>(nullptr, [&]() -> sdio_storage* {
    if (!THPStorage_Check(untyped_storage)) {
      PyErr_Format(PyExc_TypeError, "expected torch.UntypedStorage, got %.200s", Py_TYPE(untyped_storage)->tp_name);
      return nullptr;
    }
    return storage_retain(handle_of(THPStorage_Unpack(untyped_storage)));
  });
}

PyObject* storage_wrap(const sdio_storage* storage) noexcept {
  return or_python_error<PyObject*>(nullptr, [&] { return THPStorage_Wrap(shared(storage)); });
}

int storage_facts(const sdio_storage* storage, sdio_storage_facts* facts) noexcept {
  return or_python_error(-1, [&] {
    const c10::StorageImpl& held = *impl_of(storage);
    facts->data = static_cast<const char*>(data_of(storage));
    facts->nbytes = held.nbytes();
    facts->on_host = held.device_type() == c10::DeviceType::CPU ? 1 : 0;
    return 0;
  });
}

void storage_device(const sdio_storage* storage, char* name, size_t size) noexcept {
  const std::string device = impl_of(storage)->device().str();
  const size_t length = std::min(device.size(), size - 1);
  std::memcpy(name, device.data(), length);
  name[length] = '\0';
}

PyObject* storage_over(char* data, uint64_t nbytes, void (*release)(void*), void* context) noexcept {
  auto* const lent = new (std::nothrow) Lent{release, context};
  if (lent == nullptr) {
    release(context);
    return PyErr_NoMemory();
  }
  return or_python_error<PyObject*>(nullptr, [&] {
    c10::DataPtr memory(data, lent, &give_back, c10::DeviceType::CPU);
    // Not resizable, as torch.load's: else a tensor that claims more than its storage would have it grown.
    return THPStorage_Wrap(c10::Storage(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), nbytes, std::move(memory), c10::GetCPUAllocator(), /*resizable=*/false)));
  });
}

PyObject* destination_storage(const sdio_destination* destination, size_t request) noexcept {
  return storage_wrap(destination_storage_handle(destination, request));
}

}  // namespace sdio

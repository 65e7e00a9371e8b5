// What libstdc++'s headers of GCC 12 ask of a library of GCC 12, in terms of the library of GCC 8. Linked into each
// module and hidden there: the libstdc++ that is loaded, which may be a later one, has functions of these names itself
// and must not be made to call these.
//
// <exception> is not included: its inline functions have the names of those that are wanted from the library.
#include <new>
#include <string>

#define SDIO_HIDDEN __attribute__((visibility("hidden")))

extern "C" {

// std::exception_ptr's copy constructor and destructor. It holds one pointer.
void copy_exception_ptr(void* copy, const void* original) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy_exception_ptr(void* pointer) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");

// exception_ptr::_M_addref(), _M_release(): a reference is counted by a copy that is never destroyed, and given back by
// destroying one that was never made.
SDIO_HIDDEN void count_exception(void* self) __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
SDIO_HIDDEN void release_exception(void* self) __asm__("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void count_exception(void* self) {
  void* copy;
  copy_exception_ptr(&copy, self);
}

void release_exception(void* self) {
  destroy_exception_ptr(self);
  *static_cast<void**>(self) = nullptr;
}

SDIO_HIDDEN void throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// The default constructors of string streams, by those that take a mode: std::ios_base::in is 8, out is 16.
#define SDIO_STREAM(name) "_ZNSt7__cxx11" name "IcSt11char_traitsIcESaIcEEC1E"
#define SDIO_DEFAULT_CONSTRUCTOR(function, name, mode)                                                \
  void function##_with_mode(void* self, int openmode) __asm__(SDIO_STREAM(name) "St13_Ios_Openmode"); \
  SDIO_HIDDEN void function(void* self) __asm__(SDIO_STREAM(name) "v");                               \
  void function(void* self) { function##_with_mode(self, mode); }

SDIO_DEFAULT_CONSTRUCTOR(construct_istringstream, "19basic_istringstream", 8)
SDIO_DEFAULT_CONSTRUCTOR(construct_ostringstream, "19basic_ostringstream", 16)
SDIO_DEFAULT_CONSTRUCTOR(construct_stringstream, "18basic_stringstream", 8 | 16)

}  // extern "C"

// What C++20 adds to str() of string streams: giving its text away, and taking one over. Here both copy.
#define SDIO_STRINGBUF(prefix, suffix) "_ZN" prefix "St7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3str" suffix

std::string copy_text(const void* stringbuf) __asm__(SDIO_STRINGBUF("K", "Ev"));
SDIO_HIDDEN std::string give_text(void* stringbuf) __asm__(SDIO_STRINGBUF("O", "Ev"));
std::string give_text(void* stringbuf) { return copy_text(stringbuf); }
SDIO_HIDDEN std::string show_text(const void* stringbuf) __asm__(SDIO_STRINGBUF("KR", "Ev"));
std::string show_text(const void* stringbuf) { return copy_text(stringbuf); }

void set_text(void* stringbuf, const std::string& text) __asm__(SDIO_STRINGBUF("", "ERKNS_12basic_stringIcS2_S3_EE"));
SDIO_HIDDEN void take_text(void* stringbuf,
                           std::string&& text) __asm__(SDIO_STRINGBUF("", "EONS_12basic_stringIcS2_S3_EE"));
void take_text(void* stringbuf, std::string&& text) { set_text(stringbuf, text); }

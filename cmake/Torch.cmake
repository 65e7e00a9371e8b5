# LibTorch as imported targets, from the torch package directory TORCH_DIR (the one that holds version.py).
#
# find_package(Torch) is not used: for a torch built for CUDA it demands the CUDA toolkit, of which nothing here needs a
# header or a library. The core libraries and headers of every torch serve.
#
# Defines the targets torch::core (c10, torch_cpu) and torch::python (the same, and torch_python, for code that handles
# Python objects), and the variables SDIO_TORCH_VERSION, SDIO_TORCH_CXX11_ABI (True or False) and
# SDIO_TORCH_CXX_STANDARD, which its headers need.

if(NOT EXISTS "${TORCH_DIR}/version.py" OR NOT IS_DIRECTORY "${TORCH_DIR}/include")
  message(FATAL_ERROR "TORCH_DIR='${TORCH_DIR}' is not the directory of an installed torch")
endif()

file(STRINGS "${TORCH_DIR}/version.py" _version_line REGEX "^__version__" LIMIT_COUNT 1)
if(NOT _version_line MATCHES "=[ ]*[\"']([^\"']+)[\"']")
  message(FATAL_ERROR "${TORCH_DIR}/version.py names no version")
endif()
set(SDIO_TORCH_VERSION "${CMAKE_MATCH_1}")

foreach(_name c10 torch_cpu torch_python)
  set(_path "${TORCH_DIR}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}${_name}${CMAKE_SHARED_LIBRARY_SUFFIX}")
  if(NOT EXISTS "${_path}")
    message(FATAL_ERROR "torch ${SDIO_TORCH_VERSION} at ${TORCH_DIR} has no ${_path}")
  endif()
  add_library(torch::${_name} SHARED IMPORTED)
  set_target_properties(torch::${_name} PROPERTIES IMPORTED_LOCATION "${_path}")
endforeach()

# Which std::string the libraries were compiled with, read off the symbol of a function that takes one.
file(STRINGS "${TORCH_DIR}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}c10${CMAKE_SHARED_LIBRARY_SUFFIX}" _cxx11_symbol
     REGEX "torchCheckFail.*__cxx11" LIMIT_COUNT 1)
if(_cxx11_symbol)
  set(SDIO_TORCH_CXX11_ABI True)
else()
  set(SDIO_TORCH_CXX11_ABI False)
endif()

if(SDIO_TORCH_VERSION VERSION_GREATER_EQUAL 2.14)
  set(SDIO_TORCH_CXX_STANDARD 20)
else()
  set(SDIO_TORCH_CXX_STANDARD 17)
endif()

add_library(torch::core INTERFACE IMPORTED)
target_compile_definitions(torch::core INTERFACE _GLIBCXX_USE_CXX11_ABI=$<BOOL:${SDIO_TORCH_CXX11_ABI}>)
# Headers of an imported target are system headers: warnings in them are not ours.
target_include_directories(torch::core INTERFACE "${TORCH_DIR}/include" "${TORCH_DIR}/include/torch/csrc/api/include")
target_link_libraries(torch::core INTERFACE torch::c10 torch::torch_cpu)

add_library(torch::python INTERFACE IMPORTED)
target_link_libraries(torch::python INTERFACE torch::core torch::torch_python)

message(STATUS "torch ${SDIO_TORCH_VERSION} at ${TORCH_DIR}, new libstdc++ ABI: ${SDIO_TORCH_CXX11_ABI}")

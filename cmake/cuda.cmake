# The extension _cuda: kernels for the chosen compute capabilities. Static CUDA run time and no libtorch: one build serves every
# torch version and needs only the driver.
include(cmake/cuda_architectures.cmake)

if(DELTAIC_CUDA STREQUAL "AUTO" AND NOT DELTAIC_CUDA_ARCHS)
  deltaic_cuda_cards(cards)  # first, as it takes no time where there is no card
  if(NOT cards)
    message(STATUS "CUDA kernels are not built: no NVIDIA GPU in this machine (DELTAIC_CUDA=ON builds them for all)")
    return()
  endif()
endif()
include(CheckLanguage)
check_language(CUDA)
deltaic_cuda_architectures(architectures names problem)
if(problem)
  if(DELTAIC_CUDA STREQUAL "ON")
    message(FATAL_ERROR "DELTAIC_CUDA=ON: ${problem}")
  endif()
  message(STATUS "CUDA kernels are not built: ${problem}")
  return()
endif()
message(STATUS "CUDA kernels are built for ${names}")
set(CMAKE_CUDA_ARCHITECTURES ${architectures})
enable_language(CUDA)

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
add_library(deltaic_cuda OBJECT ${cuda_sources})
# The dialect is passed by flag, as a CMake older than the toolkit does not know that this one has C++20. It must then pass
# none of its own: settings for C++ stand for those of CUDA that are not given.
foreach(setting CXX_STANDARD CXX_STANDARD_REQUIRED CXX_EXTENSIONS)
  set_property(TARGET deltaic_cuda PROPERTY ${setting})
endforeach()
set_target_properties(deltaic_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
target_include_directories(deltaic_cuda PRIVATE csrc)
target_compile_options(deltaic_cuda PRIVATE -std=c++20 --extended-lambda -Xcompiler=-Wall,-Wextra)

pybind11_add_module(_cuda NO_EXTRAS csrc/bindings/cuda_module.cpp csrc/core/error.cpp)
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_include_directories(_cuda PRIVATE csrc)
target_compile_definitions(_cuda PRIVATE "DELTAIC_CUDA_ARCHITECTURES=\"${names}\"")
target_compile_options(_cuda PRIVATE -Wall -Wextra)
target_link_libraries(_cuda PRIVATE deltaic_cuda)
install(TARGETS _cuda LIBRARY DESTINATION deltaic)

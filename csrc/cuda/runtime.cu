// What the CUDA runtime says: errors as text, the toolkit this was built with, the driver, the cards.
#include <cstdlib>
#include <string>

#include "cuda/common.cuh"
#include "cuda/ops.h"
#include "cuda/runtime.h"

namespace deltaic {
namespace cuda {

void throw_cuda_error(const char* what, cudaError_t error) {
    cudaGetLastError();  // the runtime keeps it, and the next launch would be blamed
    throw Error(std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

bool overlap_kernels = false;

int toolkit_version() { return CUDART_VERSION; }

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string device_problem() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return cudaGetErrorName(error);
    }
    return count ? "" : "cudaErrorNoDevice";
}

namespace {
__global__ void probe_kernel() {}
int used_device = 0;

void set_device(int index) {
    const cudaError_t error = cudaSetDevice(index);
    if (error != cudaSuccess) throw_cuda_error("cudaSetDevice", error);
}

// The compute capability that the code which the current card runs was written for, such as 90; 0 if there is none.
int code_version() {
    cudaFuncAttributes attributes;
    const bool found = cudaFuncGetAttributes(&attributes, probe_kernel) == cudaSuccess;
    cudaGetLastError();
    return found ? attributes.ptxVersion : 0;
}
}  // namespace

void use_device(int index) {
    used_device = index;
    int major = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    if (error != cudaSuccess) throw_cuda_error("cudaDeviceGetAttribute", error);
    use_tensor_cores(major >= 8);
    const char* overlap = std::getenv("DELTAIC_PDL");  // not the default before it has been measured on a card
    const DeviceGuard guard;
    overlap_kernels = overlap && std::string(overlap) == "1" && code_version() >= 90;  // older code waits for nothing
}

DeviceGuard::DeviceGuard() {
    int current = 0;
    const bool known = cudaGetDevice(&current) == cudaSuccess;
    if (known && current == used_device) return;
    set_device(used_device);
    if (known) before_ = current;
}

DeviceGuard::~DeviceGuard() {
    if (before_ >= 0) cudaSetDevice(before_);
}

bool has_kernels() { return code_version() > 0; }

}  // namespace cuda
}  // namespace deltaic

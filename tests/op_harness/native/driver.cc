// Runs cases of the op harness on the library's CPU kernels without ONNX Runtime: driver CASES [--isa NAME] [--runs N]
// [--plant short|race|overflow]
//
// A case is run once by itself and compared with what is expected (NMSE), then by several threads at once on one kernel
// with shared workers, in which every y must be the first one's bits. `--plant` puts one mistake in, which a sanitizer
// must find: the last row of w is missing from memory, two runs write one y, an int overflows.
//
// CASES is what native.py writes: per case a line of text for every field, then the bytes of each tensor.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>

#include "fake_ort.h"

extern "C" ort::StatusPtr ORT_CALL RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base);
extern "C" int sparsegate_force_isa(const char* name);
extern "C" const char* sparsegate_isa(void);

namespace {

struct Case {
  std::string name, op;
  double bound = 0;
  std::map<std::string, std::string> attributes;
  std::vector<std::unique_ptr<ort::Value>> inputs;  // x first
  std::vector<double> expected;
};

[[noreturn]] void fail(const std::string& text) {
  std::cerr << "driver: " << text << "\n";
  std::exit(2);
}

std::string line(std::ifstream& file) {
  std::string text;
  if (!std::getline(file, text)) fail("the file of cases ends too early");
  return text;
}

// "type dims..." and the bytes; every tensor lies in memory of just its size, so that a read past its end is seen
std::unique_ptr<ort::Value> tensor(std::ifstream& file, size_t missing) {
  std::istringstream head(line(file));
  auto value = std::make_unique<ort::Value>();
  head >> value->info.type;
  size_t bytes = ort::element_bytes(value->info.type);
  for (int64_t dim; head >> dim;) value->info.dims.push_back(dim), bytes *= static_cast<size_t>(dim);
  std::vector<char> read(bytes);
  file.read(read.data(), static_cast<std::streamsize>(bytes));
  value->storage.assign(read.begin(), read.end() - static_cast<std::ptrdiff_t>(
                                                       missing ? bytes / static_cast<size_t>(value->info.dims[0]) : 0));
  value->storage.shrink_to_fit();
  value->data = value->storage.data();
  return value;
}

bool read(std::ifstream& file, bool shorten, Case& out) {
  if (!std::getline(file, out.name) || out.name.empty()) return false;
  out.op = line(file);
  out.bound = std::stod(line(file));
  for (int left = std::stoi(line(file)); left > 0; --left) {
    const std::string key = line(file);
    out.attributes[key] = line(file);
  }
  for (int left = std::stoi(line(file)); left > 0; --left) {
    const std::string role = line(file);
    out.inputs.push_back(tensor(file, shorten && (role == "w" || role == "w_up")));
  }
  out.expected.resize(std::stoul(line(file)));
  file.read(reinterpret_cast<char*>(out.expected.data()),
            static_cast<std::streamsize>(out.expected.size() * sizeof(double)));
  return line(file).empty();
}

double number(int type, const char* at) {
  uint32_t bits = 0;
  std::memcpy(&bits, at, ort::element_bytes(type));
  if (type == ort::kFloat16) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    return bits & 0x8000u ? -size : size;
  }
  if (type == ort::kBfloat16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Kernel {
  const ort::CustomOp* op;
  void* kernel = nullptr;
  const Case& mine;
  ort::Threads& threads;

  Kernel(const ort::SessionOptions& options, const Case& given, ort::Threads& shared) : mine(given), threads(shared) {
    const auto found = options.domain->ops.find(given.op + std::to_string(given.inputs[0]->info.type));
    if (found == options.domain->ops.end()) fail("no kernel for " + given.name);
    op = found->second;
    ort::KernelInfo info{"node", given.attributes, {}};
    for (const auto& input : given.inputs) info.inputs.push_back(info.inputs.empty() ? nullptr : input.get());
    check(op->CreateKernelV2(op, ort::fake::api(), &info, &kernel));
  }
  ~Kernel() { op->KernelDestroy(kernel); }

  void check(ort::StatusPtr status) const {
    if (status) fail(mine.name + ": " + status->message);
  }

  // `into`: memory of y that the caller owns, nullptr for new memory
  std::vector<char> run(void* into = nullptr) const {
    ort::KernelContext context;
    for (const auto& input : mine.inputs) context.inputs.push_back(input.get());
    context.output.info.type = mine.inputs[0]->info.type;
    context.output.data = into;
    context.threads = &threads;
    check(op->KernelComputeV2(kernel, &context));
    return into ? std::vector<char>() : context.output.storage;
  }
};

double nmse(const Case& mine, const std::vector<char>& y) {
  const int type = mine.inputs[0]->info.type;
  if (y.size() != mine.expected.size() * ort::element_bytes(type))
    fail(mine.name + ": y has another size than expected");
  double difference = 0, energy = 1e-300;
  for (size_t i = 0; i < mine.expected.size(); ++i) {
    const double error = number(type, y.data() + i * ort::element_bytes(type)) - mine.expected[i];
    difference += error * error;
    energy += mine.expected[i] * mine.expected[i];
  }
  return difference / energy;
}

// Every thread runs all kernels, from another one on
int concurrent(const std::vector<std::unique_ptr<Kernel>>& kernels, const std::vector<std::vector<char>>& first,
               int runs, bool race) {
  std::atomic<int> wrong{0};
  std::vector<char> shared(first[0].size());
  const auto work = [&](size_t start) {
    for (int i = 0; i < runs; ++i)
      for (size_t k = 0; k < kernels.size(); ++k) {
        const size_t which = (start * 7 + k) % kernels.size();
        if (kernels[which]->run() != first[which]) ++wrong;
      }
    if (race) kernels[0]->run(shared.data());
  };
  std::vector<std::thread> callers;
  for (size_t c = 0; c < 4; ++c) callers.emplace_back(work, c);
  for (auto& caller : callers) caller.join();
  return wrong.load();
}

}  // namespace

int main(int count, char** argument) {
  std::string plant;
  int runs = 2;
  if (count < 2) fail("usage: driver CASES [--isa NAME] [--runs N] [--plant short|race|overflow]");
  for (int i = 2; i + 1 < count; i += 2) {
    const std::string key = argument[i], value = argument[i + 1];
    if (key == "--isa" && !sparsegate_force_isa(value.c_str())) {
      std::cout << "no " << value << "\n";
      return 3;
    }
    if (key == "--runs") runs = std::stoi(value);
    if (key == "--plant") plant = value;
  }
  const ort::ApiBase base{ort::fake::GetApi, ort::fake::GetVersionString};
  ort::SessionOptions options;
  if (ort::StatusPtr status = RegisterCustomOps(&options, &base)) fail(status->message);

  std::ifstream file(argument[1], std::ios::binary);
  std::vector<std::unique_ptr<Case>> cases;
  for (auto next = std::make_unique<Case>(); read(file, plant == "short", *next); next = std::make_unique<Case>())
    cases.push_back(std::move(next));
  if (cases.empty()) fail("there are no cases");

  ort::Threads threads(3);
  std::vector<std::unique_ptr<Kernel>> kernels;
  std::vector<std::vector<char>> first;
  int bad = 0;
  for (const auto& mine : cases) {
    kernels.push_back(std::make_unique<Kernel>(options, *mine, threads));
    first.push_back(kernels.back()->run());
    const double error = nmse(*mine, first.back());
    if (error <= mine->bound) continue;
    std::cout << "FAIL " << mine->name << " nmse " << error << " above " << mine->bound << "\n";
    ++bad;
  }
  const int wrong = concurrent(kernels, first, runs, plant == "race");
  if (plant == "overflow") {
    volatile int largest = 2147483647;
    largest = largest + count;
  }
  std::cout << sparsegate_isa() << ": " << cases.size() << " cases, " << bad << " above their bound, " << wrong
            << " concurrent runs with other bits\n";
  return bad || wrong ? 1 : 0;
}

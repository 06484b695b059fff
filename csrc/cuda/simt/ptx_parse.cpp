// PTX text to instructions: statements, names, registers to slots, calls in line.
#include <algorithm>
#include <cctype>
#include <cstring>

#include "core/error.h"
#include "cuda/simt/ptx.h"

namespace simt {
namespace ptx {
namespace {

using deltaic::Error;

struct Statement {
    std::string text;  // without ';'; "{" and "}" open and close a scope; labels end with ':'
    Place place;
};

struct Function {
    std::string name;
    std::vector<std::string> results, parameters;  // their declarations
    std::vector<Statement> body;
    unsigned max_threads = 0;
};

std::string trimmed(const std::string& text) {
    const size_t first = text.find_first_not_of(" \t\r\n");
    return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

bool starts_with(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

// The parts between `separator`, where no bracket is open.
std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::string part;
    int depth = 0;
    for (const char c : text) {
        depth += c == '{' || c == '[' || c == '(' ? 1 : c == '}' || c == ']' || c == ')' ? -1 : 0;
        if (c == separator && depth == 0)
            parts.push_back(trimmed(part)), part.clear();
        else
            part += c;
    }
    part = trimmed(part);
    if (!part.empty() || !parts.empty()) parts.push_back(part);
    return parts;
}

std::string first_word(const std::string& text) { return text.substr(0, text.find_first_of(" \t\n")); }

// ".param .align 8 .b8 name[16]": name, bytes, alignment.
struct Variable {
    std::string name;
    size_t bytes = 0, align = 1;
};
Variable variable(const std::string& declaration) {
    Variable v;
    std::string rest = declaration;
    size_t element = 0;
    for (;;) {
        rest = trimmed(rest);
        const std::string word = first_word(rest);
        if (word == ".align")
            rest = trimmed(rest.substr(6)), v.align = std::stoul(rest), rest = rest.substr(first_word(rest).size());
        else if (word[0] == '.') {
            if (const int bytes = type_bytes(word.substr(1))) element = static_cast<size_t>(bytes);
            rest = rest.substr(word.size());
        } else
            break;
    }
    v.align = std::max(v.align, element);
    const size_t bracket = rest.find('[');
    v.name = trimmed(rest.substr(0, std::min(bracket, rest.find('='))));
    const std::string count =
        bracket == std::string::npos ? "" : trimmed(rest.substr(bracket + 1, rest.find(']') - bracket - 1));
    v.bytes = bracket == std::string::npos ? element : count.empty() ? 0 : element * std::stoul(count);
    return v;
}

size_t aligned(size_t offset, size_t align) { return (offset + align - 1) / align * align; }

uint64_t number(const std::string& text, int width) {
    if (starts_with(text, "0f") || starts_with(text, "0d")) return std::stoull(text.substr(2), nullptr, 16);
    const bool negative = text[0] == '-';
    const uint64_t value = std::stoull(text.substr(negative), nullptr, 0);
    return width == 1 ? value != 0 : negative ? -value : value;
}

std::string digits_off(const std::string& name) { return name.substr(0, name.find_last_not_of("0123456789") + 1); }

}  // namespace

// Reads one file.
struct Parser {
    explicit Parser(Program& into) : program(into) {}

    Program& program;
    std::shared_ptr<std::map<int, std::string>> files = std::make_shared<std::map<int, std::string>>();
    std::map<std::string, Function> functions;
    std::vector<Variable> module_shared;
    std::string dynamic_shared;
    int capability = 0;

    // --- of the kernel being decoded
    struct Register {
        uint32_t slot;
        int width;
    };
    struct Local {
        size_t offset, bytes;
    };
    struct Scope {
        std::map<std::string, Register> registers;                 // by name
        std::map<std::string, std::pair<uint32_t, int>> families;  // "%r" of "%r<9>": a number, width
        std::map<std::string, Local> variables;                    // .param of calls and .local
    };
    Kernel* kernel = nullptr;
    std::vector<Scope> scopes;
    std::map<std::pair<uint32_t, uint32_t>, Register> family_members;
    std::map<std::string, size_t> shared, parameters;
    std::map<std::pair<uint64_t, int>, uint32_t> constant_slots;
    std::map<std::string, uint32_t> special_slots;
    std::map<std::string, int> labels;
    std::vector<std::pair<size_t, std::string>> jumps;
    std::string label_prefix;
    int calls = 0;
    uint32_t family_count = 0;
    Statement at;

    [[noreturn]] void refuse(const std::string& message) const {
        throw Error("simt: PTX that the machine does not run, " + message + ": " + at.text);
    }

    void read(const std::string& text);
    void top_level(const std::string& text, size_t& i);
    void decode(const Function& f);
    void body(const std::vector<Statement>& statements);
    void statement(const std::string& text);
    void declaration(const std::string& text);
    void instruction(std::string text);
    void access(Instr in, const std::string& name, const std::vector<std::string>& operands);
    void call(const std::string& text);

    uint32_t new_slot(int width) {
        const uint32_t slot = kernel->slots;
        kernel->slots += width == 64 ? 2 : 1;
        return slot;
    }
    uint32_t constant(uint64_t value, int width) {
        const auto [found, added] = constant_slots.try_emplace({value, width}, 0);
        if (added) found->second = new_slot(width), kernel->constants.push_back({found->second, width, value});
        return found->second;
    }
    const Register* find_register(const std::string& name) {
        const std::string family = digits_off(name);
        for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
            const auto one = scope->registers.find(name);
            if (one != scope->registers.end()) return &one->second;
            const auto many = scope->families.find(family);
            if (many != scope->families.end() && family.size() < name.size()) {
                const auto key =
                    std::make_pair(many->second.first, static_cast<uint32_t>(std::stoul(name.substr(family.size()))));
                const auto [member, added] = family_members.try_emplace(key, Register{0, many->second.second});
                if (added) member->second.slot = new_slot(many->second.second);
                return &member->second;
            }
        }
        return nullptr;
    }
    const Local* find_variable(const std::string& name) const {
        for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
            const auto found = scope->variables.find(name);
            if (found != scope->variables.end()) return &found->second;
        }
        return nullptr;
    }
    Local new_local(size_t bytes, size_t align) {
        const size_t offset = aligned(kernel->local_bytes, align);
        kernel->local_bytes = offset + bytes;
        return {offset, bytes};
    }
    // The address of a variable; false where the name is none.
    bool address_of(const std::string& name, uint64_t* address, Space* space) const {
        if (const Local* local = find_variable(name)) return *address = local->offset, *space = Space::local, true;
        if (const auto s = shared.find(name); s != shared.end())
            return *address = s->second, *space = Space::shared, true;
        if (const auto p = parameters.find(name); p != parameters.end())
            return *address = p->second, *space = Space::parameter, true;
        if (const auto g = program.globals_.find(name); g != program.globals_.end())
            return *address = reinterpret_cast<uintptr_t>(g->second.get()), *space = Space::global, true;
        return false;
    }
    // The slot of a source or result of `width` bits.
    uint32_t operand(const std::string& text, int width) {
        if (text[0] == '%') {
            if (const auto special = std::find(std::begin(kSpecials), std::end(kSpecials), text);
                special != std::end(kSpecials)) {
                const auto [found, added] = special_slots.try_emplace(text, 0);
                if (added) {
                    found->second = new_slot(32);
                    kernel->specials.emplace_back(special - std::begin(kSpecials), found->second);
                }
                return found->second;
            }
            const Register* r = find_register(text);
            if (!r) refuse("unknown register " + text);
            if (r->width != width)
                refuse(text + " has " + std::to_string(r->width) + " bits, expected " + std::to_string(width));
            return r->slot;
        }
        if (text[0] == '!') {  // a predicate turned round
            Instr in = fresh("not.pred", *find_opcode("not.pred"));
            in.r[1] = in.r[2] = operand(text.substr(1), 1), in.r[0] = new_slot(1);
            kernel->code.push_back(in);
            return in.r[0];
        }
        if (text == "_") return new_slot(width);
        uint64_t value;
        Space space;
        if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-')
            value = number(text, width);
        else if (!address_of(text, &value, &space))
            refuse("unknown name " + text);
        return constant(value, width);
    }
    Instr fresh(const std::string& name, const Opcode& opcode) {
        Instr in;
        in.name = &*program.names_.insert(name).first;
        in.execute = opcode.execute, in.kind = opcode.kind;
        in.place = static_cast<uint32_t>(kernel->places.size());
        kernel->places.push_back(at.place);
        return in;
    }
};

void Parser::read(const std::string& text) {
    for (size_t i = 0; i < text.size();) top_level(text, i);
    for (const auto& [name, f] : functions)
        if (f.results.empty() && !f.body.empty()) decode(f);
}

// One directive, declaration or function that begins at i.
void Parser::top_level(const std::string& text, size_t& i) {
    while (i < text.size() && std::isspace(static_cast<unsigned char>(text[i]))) ++i;
    if (i >= text.size()) return;
    const std::string line = text.substr(i, text.find('\n', i) - i);
    const std::string word = first_word(line);
    if (word == ".version" || word == ".address_size" || word == ".target" || word == ".file") {
        if (word == ".target") capability = std::stoi(line.substr(line.find("sm_") + 3));
        if (word == ".file") {
            const size_t quote = line.find('"'), slash = line.rfind('/', line.rfind('"'));
            (*files)[std::stoi(line.substr(6))] =
                line.substr(std::max(quote, slash) + 1, line.rfind('"') - std::max(quote, slash) - 1);
        }
        i += line.size();
        return;
    }
    if (word == ".section") {  // debugging information
        i = text.find('}', i);
        i = i == std::string::npos ? text.size() : i + 1;
        return;
    }
    // Up to the ';' of a declaration, or the '{' of a body.
    size_t end = i;
    int depth = 0;
    while (end < text.size() && !(depth == 0 && (text[end] == ';' || (text[end] == '{' && text.find('=', i) > end)))) {
        depth += text[end] == '(' || text[end] == '{' ? 1 : text[end] == ')' || text[end] == '}' ? -1 : 0;
        ++end;
    }
    const std::string head = trimmed(text.substr(i, end - i));
    at = {head, {}};
    i = end + 1;
    const bool entry = head.find(".entry") != std::string::npos, function = head.find(".func") != std::string::npos;
    if (!entry && !function) {
        if (head.find(".shared") != std::string::npos) {
            const Variable v = variable(head);
            if (head.find(".extern") != std::string::npos)
                dynamic_shared = v.name;
            else
                module_shared.push_back(v);
        } else if (head.find(".global") != std::string::npos || head.find(".const") != std::string::npos) {
            const Variable v = variable(head);
            auto& memory = program.globals_[v.name];
            memory = std::make_unique<uint8_t[]>(aligned(v.bytes, 16) + 16);
            if (const size_t brace = head.find('{'); brace != std::string::npos) {
                if (head.find(".b8") == std::string::npos) refuse("a table that is not of bytes");
                uint8_t* to = memory.get();
                for (const std::string& byte : split(head.substr(brace + 1, head.rfind('}') - brace - 1), ','))
                    *to++ = static_cast<uint8_t>(std::stoul(byte));
            }
        } else
            refuse("an unknown declaration");
        return;
    }
    Function f;
    size_t name = head.find(entry ? ".entry" : ".func") + (entry ? 6 : 5);
    const auto declarations = [&](size_t open) {
        return split(head.substr(open + 1, head.find(')', open) - open - 1), ',');
    };
    while (std::isspace(static_cast<unsigned char>(head[name]))) ++name;
    if (head[name] == '(') f.results = declarations(name), name = head.find(')', name) + 1;
    const size_t open = head.find('(', name);
    f.name = trimmed(head.substr(name, open - name));
    if (open != std::string::npos) f.parameters = declarations(open);
    if (const size_t most = head.find(".maxntid"); most != std::string::npos) {
        f.max_threads = 1;
        const size_t stop = head.find('\n', most);
        for (const std::string& count :
             split(head.substr(most + 8, stop == std::string::npos ? stop : stop - most - 8), ','))
            f.max_threads *= static_cast<unsigned>(std::stoul(count));
    }
    if (end < text.size() && text[end] == ';') return;  // declared, not defined
    // The body: statements up to its closing brace.
    Place place;
    std::string part;
    const auto done = [&](const std::string& s) {
        if (!trimmed(s).empty()) f.body.push_back({trimmed(s), place});
        part.clear();
    };
    for (int level = 1; i < text.size(); ++i) {
        const char c = text[i];
        const bool begins = trimmed(part).empty();
        if (begins && c == '.' && text.compare(i, 5, ".loc\t") == 0) {
            const std::string loc = text.substr(i, text.find('\n', i) - i);
            place = {};
            std::sscanf(loc.c_str(), ".loc %d %d", &place.file, &place.line);
            if (const size_t inlined = loc.find("inlined_at"); inlined != std::string::npos)
                std::sscanf(loc.c_str() + inlined, "inlined_at %d %d", &place.outer_file, &place.outer_line);
            i += loc.size() - 1;
        } else if (c == ';') {
            done(part);
        } else if (begins && c == '{') {
            ++level, done("{");
        } else if (begins && c == '}') {
            done("}");
            if (--level == 0) break;
        } else {
            part += c;
            if (c == ':' && part.find_first_of(" \t") == std::string::npos) done(part);
        }
        if (trimmed(part).empty()) part.clear();
    }
    ++i;
    functions[f.name] = std::move(f);
}

void Parser::decode(const Function& f) {
    const auto [entry, added] = program.kernels_.try_emplace(f.name);
    if (!added) throw Error("simt: two kernels have the name " + f.name);
    Kernel& k = entry->second;
    kernel = &k;
    k.name = f.name, k.files = files, k.capability = capability, k.max_threads = f.max_threads;
    scopes.assign(1, Scope{});
    family_members.clear(), shared.clear(), parameters.clear(), constant_slots.clear(), special_slots.clear();
    labels.clear(), jumps.clear(), label_prefix.clear();
    for (const std::string& declared : f.parameters) {
        const Variable v = variable(declared);
        k.parameter_bytes = aligned(k.parameter_bytes, v.align);
        parameters[v.name] = k.parameter_bytes;
        k.parameters.emplace_back(k.parameter_bytes, v.bytes);
        k.parameter_bytes += v.bytes;
    }
    const auto place_shared = [&](const Variable& v) {
        k.shared_bytes = aligned(k.shared_bytes, v.align);
        shared[v.name] = k.shared_bytes;
        k.shared_bytes += v.bytes;
    };
    for (const Variable& v : module_shared)
        for (const Statement& s : f.body)
            if (s.text.find(v.name) != std::string::npos) {
                place_shared(v);
                break;
            }
    for (const Statement& s : f.body)
        if (starts_with(s.text, ".shared")) place_shared(variable(s.text));
    if (!dynamic_shared.empty()) shared[dynamic_shared] = aligned(k.shared_bytes, 16);
    body(f.body);
    for (const auto& [index, label] : jumps) {
        const auto found = labels.find(label);
        if (found == labels.end()) throw Error("simt: PTX jumps to an unknown label " + label);
        k.code[index].target = found->second;
    }
    at.text = "ret";
    Instr end = fresh("ret", {nullptr, {}, Kind::exit});
    k.code.push_back(end);
    k.local_bytes = aligned(k.local_bytes, 16);
}

void Parser::body(const std::vector<Statement>& statements) {
    for (const Statement& s : statements) {
        at = s;
        statement(s.text);
    }
}

void Parser::statement(const std::string& text) {
    if (text == "{")
        scopes.emplace_back();
    else if (text == "}") {
        if (scopes.size() > 1) scopes.pop_back();
    } else if (text.back() == ':')
        labels[label_prefix + text.substr(0, text.size() - 1)] = static_cast<int>(kernel->code.size());
    else if (text[0] == '.')
        declaration(text);
    else if (starts_with(text, "call"))
        call(text);
    else
        instruction(text);
}

void Parser::declaration(const std::string& text) {
    const std::string word = first_word(text);
    if (word == ".pragma" || word == ".shared") return;  // shared: placed before
    if (word == ".param" || word == ".local") {
        const Variable v = variable(text);
        scopes.back().variables[v.name] = new_local(v.bytes, v.align);
        return;
    }
    if (word != ".reg") refuse("an unknown directive");
    const std::string rest = trimmed(text.substr(4)), type = first_word(rest);
    const int width = type == ".pred" ? 1 : type_bytes(type.substr(1)) * 8;
    for (const std::string& name : split(rest.substr(type.size()), ',')) {
        const size_t angle = name.find('<');
        if (angle == std::string::npos)
            scopes.back().registers[name] = {new_slot(width), width};
        else
            scopes.back().families[name.substr(0, angle)] = {family_count++, width};
    }
}

void Parser::instruction(std::string text) {
    int32_t guard = -1;
    bool guard_not = false;
    if (text[0] == '@') {
        const std::string name = first_word(text);
        guard_not = name[1] == '!';
        guard = static_cast<int32_t>(operand(name.substr(guard_not ? 2 : 1), 1));
        text = trimmed(text.substr(name.size()));
    }
    std::string name = first_word(text);
    std::vector<std::string> operands;  // flat
    for (const std::string& part : split(text.substr(name.size()), ',')) {
        if (part[0] == '{')
            for (const std::string& one : split(part.substr(1, part.size() - 2), ',')) operands.push_back(one);
        else
            for (const std::string& one : split(part, '|')) operands.push_back(one);
    }
    const auto emit = [&](Instr in) {
        in.guard = guard, in.guard_not = guard_not;
        kernel->code.push_back(in);
    };
    if (name == "bra" || name == "bra.uni") {
        jumps.emplace_back(kernel->code.size(), label_prefix + operands.at(0));
        return emit(fresh(name, {nullptr, {}, Kind::branch}));
    }
    if (name == "ret" || name == "exit") {
        if (label_prefix.empty() || name == "exit") return emit(fresh(name, {nullptr, {}, Kind::exit}));
        jumps.emplace_back(kernel->code.size(), label_prefix + "return");
        return emit(fresh("ret", {nullptr, {}, Kind::branch}));
    }
    if (name == "bar.sync") {
        if (operands != std::vector<std::string>{"0"}) refuse("a barrier that is not that of all threads");
        return emit(fresh(name, {nullptr, {}, Kind::barrier}));
    }
    if (starts_with(name, "ld.") || starts_with(name, "st.") || starts_with(name, "atom.")) {
        Instr in = fresh(name, {nullptr, {}});
        in.guard = guard, in.guard_not = guard_not;
        return access(in, name, operands);
    }
    if (starts_with(name, "mov.b") && operands.size() == 3) {
        if (text.find('{') < text.find(',')) {  // apart
            const std::string bits = name.substr(4);
            // Through a copy: a result may be the source.
            const Opcode &low = *find_opcode("low." + bits), &high = *find_opcode("high." + bits),
                         &copy = *find_opcode("mov." + bits);
            Instr first = fresh(name, copy), second = fresh(name, low), third = fresh(name, high);
            first.r[1] = operand(operands[2], low.widths[1]), first.r[0] = new_slot(low.widths[1]);
            second.r[0] = operand(operands[0], low.widths[0]), third.r[0] = operand(operands[1], low.widths[0]);
            second.r[1] = third.r[1] = first.r[0];
            emit(first), emit(second), emit(third);
            return;
        }
        name = "pack." + name.substr(4);
    }
    const Opcode* opcode = find_opcode(name);
    if (!opcode) refuse("the opcode " + name);
    if (operands.size() != opcode->widths.size()) refuse("another number of operands than the opcode has");
    Instr in = fresh(name, *opcode);
    for (size_t i = 0; i < operands.size(); ++i) {
        const Register* given = starts_with(name, "cvt.") && i == 1 ? find_register(operands[1]) : nullptr;
        if (given && given->width == 64 && opcode->widths[1] == 32) {  // a conversion takes the lower part
            Instr part = fresh(name, *find_opcode("low.b64"));
            part.r[0] = new_slot(32), part.r[1] = part.r[2] = given->slot;
            kernel->code.push_back(part);
            in.r[1] = part.r[0];
        } else
            in.r[i] = operand(operands[i], opcode->widths[i]);
    }
    if (operands.size() == 2) in.r[2] = in.r[1];  // not.pred and mov.pred run as operations of two
    if (opcode->kind == Kind::together && !starts_with(name, "mma"))
        in.members = static_cast<int32_t>(in.r[operands.size() - 1]);
    kernel->waits |= name == "griddepcontrol.wait";
    if (in.execute) emit(in);
}

// ld, st and atom: opcode[.space][.nc][.operation][.v2|.v4].type; operands with the vector flat.
void Parser::access(Instr in, const std::string& name, const std::vector<std::string>& operands) {
    std::vector<std::string> parts = split(name, '.');
    std::string what = parts[0];
    const std::string type = parts.back();
    const int bytes = type_bytes(type);
    if (!bytes) refuse("a type of memory");
    for (size_t i = 1; i + 1 < parts.size(); ++i) {
        const std::string& part = parts[i];
        if (part == "global" || part == "const")
            in.space = Space::global;
        else if (part == "shared")
            in.space = Space::shared;
        else if (part == "local")
            in.space = Space::local;
        else if (part == "param")
            in.space = Space::parameter;
        else if (part == "v2" || part == "v4")
            in.count = static_cast<uint8_t>(part[1] - '0');
        else if (part == "nc")
            continue;
        else if (what == "atom")
            what += "." + part;
        else
            refuse("the modifier ." + part);
    }
    const bool stores = what == "st";
    in.element = static_cast<uint8_t>(bytes);
    in.access = stores ? Access::store : what == "ld" ? Access::load : Access::atomic;
    const size_t values = what == "atom.add" ? 2 : in.count;
    if (operands.size() != values + 1) refuse("another number of operands than the opcode has");
    const std::string& address = operands[stores ? 0 : what == "ld" ? values : 1];
    // [register], [register+offset], [name+offset], [offset]
    std::string base = trimmed(address.substr(1, address.size() - 2));
    if (const size_t plus = base.find('+'); plus != std::string::npos) {
        in.offset = std::stoll(base.substr(plus + 1));
        base = trimmed(base.substr(0, plus));
    }
    uint64_t start;
    Space found = in.space;
    if (const Register* r = base[0] == '%' ? find_register(base) : nullptr) {
        in.base = static_cast<int32_t>(r->slot), in.wide_base = r->width == 64;
    } else if (address_of(base, &start, &found)) {
        // What a call passes lies in local memory.
        if (found != in.space && !(in.space == Space::parameter && found == Space::local))
            refuse("a name of another space");
        in.space = found, in.offset += static_cast<int64_t>(start);
    } else
        refuse("an address of another form");
    if (in.space == Space::parameter && in.base < 0 &&
        static_cast<size_t>(in.offset) + static_cast<size_t>(bytes) * in.count > kernel->parameter_bytes)
        refuse("a read beyond the parameters");
    const auto width_of = [&](const std::string& text) {
        const Register* r = text[0] == '%' ? find_register(text) : nullptr;
        return r ? r->width : bytes * 8;
    };
    int width = 0;
    size_t slot = 0;
    for (size_t i = 0; i < operands.size(); ++i) {
        if (&operands[i] == &address) continue;
        width = width ? width : width_of(operands[i]);
        in.r[slot++] = operand(operands[i], width);
    }
    in.execute = memory_opcode(what, type, width);
    if (!in.execute) refuse("the opcode " + name + " with registers of " + std::to_string(width) + " bits");
    for (const auto& [space, unit] :
         {std::pair(Space::shared, &kernel->shared_unit), {Space::global, &kernel->global_unit}})
        if (in.space == space || in.space == Space::generic) *unit = std::min(*unit, static_cast<size_t>(bytes));
    kernel->code.push_back(in);
}

// call.uni (results), name, (parameters): the function's body in line, its parameters the caller's.
void Parser::call(const std::string& text) {
    const std::vector<std::string> parts = split(text.substr(first_word(text).size()), ',');
    if (parts.size() != 3) refuse("a call of another form");
    const auto list = [](const std::string& s) { return split(s.substr(1, s.size() - 2), ','); };
    const std::vector<std::string> results = list(parts[0]), given = list(parts[2]);
    const auto found = functions.find(parts[1]);
    if (found == functions.end()) refuse("an unknown function");
    const Function& f = found->second;
    if (results.size() != f.results.size() || given.size() != f.parameters.size())
        refuse("a call with other parameters");
    if (!label_prefix.empty()) refuse("a call within a call");
    Scope scope;
    const auto pass = [&](const std::string& declared, const std::string& from) {
        const Local* variable_of_caller = find_variable(from);
        const Variable v = variable(declared);
        if (!variable_of_caller || variable_of_caller->bytes != v.bytes) refuse("a parameter of another size");
        scope.variables[v.name] = *variable_of_caller;
    };
    for (size_t i = 0; i < results.size(); ++i) pass(f.results[i], results[i]);
    for (size_t i = 0; i < given.size(); ++i) pass(f.parameters[i], given[i]);
    const std::vector<Scope> outer = scopes;
    scopes.assign(1, scope);
    label_prefix = "call " + std::to_string(++calls) + " ";
    body(f.body);
    labels[label_prefix + "return"] = static_cast<int>(kernel->code.size());
    label_prefix.clear();
    scopes = outer;
}

void Program::add(const std::string& text) {
    std::string plain;  // without comments
    for (size_t i = 0; i < text.size();) {
        if (text.compare(i, 2, "//") == 0)
            i = std::min(text.find('\n', i), text.size());
        else
            plain += text[i++];
    }
    Parser(*this).read(plain);
}

const Kernel* Program::find(const std::string& name) const {
    const auto found = kernels_.find(name);
    return found == kernels_.end() ? nullptr : &found->second;
}

}  // namespace ptx
}  // namespace simt

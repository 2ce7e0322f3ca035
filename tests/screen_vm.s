# SPDX-License-Identifier: MIT OR Apache-2.0
# The whole system of the virtual machine in screen_vm.py: a boot sector that shows the picture behind it
# on the disk and moves it SPEED pixels to the left, RATE times a second. It says "shown" when it begins.
#
# The picture lies on the disk in the form in which the graphics card wants it: 32 bits a pixel, each row
# twice, so that a window of WIDTH pixels can move over it. Only the start of the window changes.
#
# WIDTH, HEIGHT, SPEED, RATE: given to the assembler. Intel 8253 and BIOS: as on each PC; the graphics
# card's registers: QEMU, docs/specs/standard-vga.rst and Bochs' VBE DISPI interface.

        .code16
        .globl  _start

        .set    DISPI, 0x1ce            # index; the value is one further
        .set    DISPI_XRES, 1
        .set    DISPI_YRES, 2
        .set    DISPI_BPP, 3
        .set    DISPI_ENABLE, 4
        .set    DISPI_BANK, 5
        .set    DISPI_VIRTUAL_WIDTH, 6
        .set    DISPI_X_OFFSET, 8
        .set    WINDOW, 0xa000          # segment through which one bank of the card's memory is seen
        .set    BANK_SECTORS, 128       # of 512 bytes, 64 KiB
        .set    READ_SECTORS, 64        # at once; BIOSes take up to 127
        .set    SECTORS, WIDTH * 2 * 4 * HEIGHT / 512
        .set    TICKS, 0x46c            # counted by the BIOS at each interrupt of the timer
        .set    TIMER_HZ, 1193182
        .set    CONSOLE, 0xe9           # -debugcon

        .macro  dispi index, value
        movw    $\index, %ax
        movw    \value, %cx
        call    set_dispi
        .endm

_start:
        ljmp    $0, $begin
begin:
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $_start, %sp
        movb    %dl, drive

        dispi   DISPI_ENABLE, $0
        dispi   DISPI_XRES, $WIDTH
        dispi   DISPI_YRES, $HEIGHT
        dispi   DISPI_BPP, $32
        dispi   DISPI_ENABLE, $0x41     # enabled, linear; memory is cleared
        dispi   DISPI_VIRTUAL_WIDTH, $(2 * WIDTH)

        # The picture, bank by bank, straight from the disk into the card's memory.
        xorw    %bp, %bp
bank:
        dispi   DISPI_BANK, %bp
        movw    $WINDOW, segment
half:
        movw    $packet, %si
        movb    drive, %dl
        movb    $0x42, %ah              # extended read
        int     $0x13
        jc      fail
        addw    $READ_SECTORS, sector
        addw    $(READ_SECTORS * 512 / 16), segment
        cmpw    $(WINDOW + BANK_SECTORS * 512 / 16), segment
        jne     half
        incw    %bp
        cmpw    $((SECTORS + BANK_SECTORS - 1) / BANK_SECTORS), %bp
        jne     bank

        # The timer's interrupt, RATE times a second.
        movb    $0x36, %al
        outb    %al, $0x43
        movw    $(TIMER_HZ / RATE), %ax
        outb    %al, $0x40
        movb    %ah, %al
        outb    %al, $0x40

        movw    $shown, %si
say:
        lodsb
        outb    %al, $CONSOLE
        cmpb    $'\n', %al
        jne     say

        xorw    %bp, %bp                # where the window begins
move:
        dispi   DISPI_X_OFFSET, %bp
        addw    $SPEED, %bp
        cmpw    $WIDTH, %bp
        jb      sleep
        xorw    %bp, %bp
sleep:
        movw    TICKS, %bx
again:
        sti
        hlt
        cmpw    TICKS, %bx
        je      again
        jmp     move

fail:
        hlt
        jmp     fail

# Gives the register %ax the value %cx.
set_dispi:
        movw    $DISPI, %dx
        outw    %ax, %dx
        incw    %dx
        movw    %cx, %ax
        outw    %ax, %dx
        ret

shown:  .ascii  "shown\n"
drive:  .byte   0
        .align  4
packet: .byte   16, 0                   # its size
        .word   READ_SECTORS
        .word   0                       # offset
segment:
        .word   0
sector: .long   1, 0                    # behind this one

        .org    510
        .word   0xaa55
